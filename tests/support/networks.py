"""Tiny networks of every architecture, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from els_service.denoisers.networks import (
    Execution,
    NetworkConfig,
    NetworkDenoiser,
    NetworkDocument,
    build_network,
    save_network_folder,
)

SHAPE = (2, 8, 12)
LABELS = 3
WIDTHS = {"resnet": (8,), "unet": (4, 8, 8), "unet-attention": (4, 8, 8)}


def config(architecture: str = "resnet", **fields: Any) -> NetworkConfig:
    """Return a small class-conditional network that also answers without a label."""
    defaults: dict[str, Any] = {
        "shape": SHAPE,
        "widths": WIDTHS[architecture],
        "label_count": LABELS,
        "null_label": fields.get("label_count", LABELS) > 0,
    }
    return NetworkConfig(architecture=architecture, **defaults | fields)


def denoiser(of: NetworkConfig, seed: int = 0, **execution: Any) -> NetworkDenoiser:
    """Return a denoiser with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build_network(of)
    return NetworkDenoiser(network, NetworkDocument(of, Execution(**execution)))


def write_folder(folder: Path, of: NetworkConfig, seed: int = 0, **execution: Any) -> Path:
    """Write a model folder with random weights and return it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tensors = build_network(of).state_dict()
    save_network_folder(folder, NetworkDocument(of, Execution(**execution)), tensors)
    return folder
