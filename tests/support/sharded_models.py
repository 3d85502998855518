"""A models root whose bank is in shards: every machine twice, in one process and in shards."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from els_service.denoisers.banks import Bank, make_bank, save_bank

SHAPE = (1, 6, 5)
IMAGES = 1200
"""Three blocks of a bank."""
BANK = "bank: ../_banks/fashion.safetensors\n"
MACHINES = {
    "ideal": "machine: ideal\n",
    "local": "machine: local\nwindow: 3\n",
    "local-circular": "machine: local\npadding: circular\nwindow: 3\n",
    "equivariant": "machine: equivariant\n",
    "zeros": "machine: els\nwindow: 3\n",
    "circular": "machine: els\npadding: circular\nwindow: 3\n",
    "valid": "machine: els\npadding: valid\nwindow: 3\n",
}
FOLDS = {
    "fold": "machine: els\nwindow: 3\nfold: 0.2\n",
    "mean-of-patches": "machine: local\npadding: inside\nwindow: 3\nfold: inf\n",
    "sized": "machine: els\nwindow: 3\nsizes: any\n",
}
"""Machines whose patches are folded, and one that answers any size."""


def block_bank(seed: int = 0) -> Bank:
    """Return a bank of three labels, whose ranges end within blocks."""
    pixels = np.random.default_rng(seed).integers(0, 256, (IMAGES, *SHAPE)).astype(np.uint8)
    return make_bank(pixels, np.arange(IMAGES) % 3)


def write_sharded_models(root: Path, shards: int = 2) -> Path:
    """Write a models root with ``NAME`` and ``NAME-sharded`` of every machine; return it."""
    (root / "_banks").mkdir(parents=True)
    save_bank(block_bank(), root / "_banks" / "fashion.safetensors")
    for name, machine in (MACHINES | FOLDS).items():
        add_model(root, name, machine + BANK)
        add_model(root, f"{name}-sharded", f"{machine}{BANK}shards: {shards}\n")
    return root


def add_model(root: Path, name: str, document: str) -> None:
    """Write one analytic model."""
    (root / name).mkdir()
    (root / name / "model.yaml").write_text(f"kind: analytic\n{document}")


def eventually(holds: Callable[[], bool], timeout_s: float = 60) -> None:
    """Wait until something holds."""
    limit = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < limit, "it did not come true in time"
        time.sleep(0.01)
