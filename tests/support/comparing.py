"""A small bank, networks and machines over it, for tests of calibration and comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tests.support.networks import config, write_folder

from els_service.denoisers.banks import Bank, make_bank, save_bank
from els_service.denoisers.base import Denoiser, DenoiserInfo
from els_service.denoisers.windows import WindowTable
from els_service.experiments.comparison.machines import build_machines
from els_service.experiments.comparison.run import Subjects
from els_service.experiments.comparison.subjects import Network, Windows

SHAPE = (1, 8, 8)
LABELS = 2


def squares(labelled: bool = True, images: int = 24, shape: tuple[int, int, int] = SHAPE) -> Bank:
    """Return grey squares, large ones of label 1, on noise: patches differ at every size."""
    numbers = np.random.default_rng(0)
    pixels = numbers.integers(0, 60, (images, *shape)).astype(np.uint8)
    for i in range(images):
        size = 2 + 2 * (i % 2)
        top, left = numbers.integers(0, np.array(shape[1:]) - size + 1)
        pixels[i, :, top : top + size, left : left + size] = numbers.integers(120, 256)
    return make_bank(pixels, np.arange(images) % 2 if labelled else None, licence="CC0")


def write_bank(path: Path, bank: Bank | None = None) -> Path:
    save_bank(bank or squares(), path)
    return path


def write_network(folder: Path, **fields: Any) -> Path:
    defaults: dict[str, Any] = {"shape": SHAPE, "label_count": LABELS, "null_label": False}
    return write_folder(folder, config(**defaults | fields))


def pretended(denoiser: Denoiser, name: str = "pretended") -> Network:
    """Return a denoiser of any kind in the place of the network."""
    return Network(name, Path(name), denoiser, f"{name}'s", 0)


def subjects(bank: Bank, windows: WindowTable | None, *names: str) -> Subjects:
    """Return machines that are compared with the first of them in the place of the network."""
    info = DenoiserInfo(kind="network", shape=bank.shape, padding="zeros")
    told = Windows(windows, "told")
    machines = build_machines(names, bank, info, windows=told)
    return Subjects(
        network=pretended(machines[names[0]]),
        bank=bank,
        windows=told,
        machines=machines,
    )
