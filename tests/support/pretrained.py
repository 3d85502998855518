"""Tiny diffusers folders with random weights, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)

SHAPE = (2, 8, 12)
LATENT = (4, 8, 8)
WIDTH = 6
"""Of a condition's rows."""
STEPS = 100
"""Timesteps of training."""
LEVELS: dict[str, Any] = {"num_train_timesteps": STEPS, "beta_start": 1e-3, "beta_end": 0.12}
"""σ from 0.03 to 24."""


def scheduler(kind: Any = DDIMScheduler, **fields: Any) -> Any:
    """Return a scheduler of theirs whose steps are ours: t = i/n is timestep T·i/n - 1."""
    defaults: dict[str, Any] = {"timestep_spacing": "trailing"}
    if kind in (DDIMScheduler, DDPMScheduler):
        defaults["clip_sample"] = False
    return kind(**LEVELS | defaults | fields)


def unet(**fields: Any) -> Any:
    """Return a small UNet2DModel with random weights."""
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "sample_size": list(SHAPE[1:]),
        "in_channels": SHAPE[0],
        "out_channels": SHAPE[0],
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
    }
    return UNet2DModel(**defaults | fields).eval().requires_grad_(False)


def conditional_unet(**fields: Any) -> Any:
    """Return a small UNet2DConditionModel over latents, with random weights."""
    torch.manual_seed(1)
    defaults: dict[str, Any] = {
        "sample_size": LATENT[1],
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": WIDTH,
    }
    return UNet2DConditionModel(**defaults | fields).eval().requires_grad_(False)


def autoencoder(**fields: Any) -> Any:
    """Return a small AutoencoderKL with random weights; an image has twice its latent's side."""
    torch.manual_seed(2)
    defaults: dict[str, Any] = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
    }
    return AutoencoderKL(**defaults | fields).eval().requires_grad_(False)


def write_folder(folder: Path, document: str, **parts: Any) -> Path:
    """Write a model folder with these parts of diffusers, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.yaml").write_text(document)
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    return folder


def edit(path: Path, **fields: Any) -> None:
    """Change fields of a configuration."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
