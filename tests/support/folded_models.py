"""Models with a fold, with queries of another size, and of a bank of images of several sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
from tests.support.models_folder import SHAPE

from els_service.denoisers.mixed_banks import AnyBank, make_mixed_bank

BANK = "bank: ../_banks/tiny.safetensors\nwindow: 3\n"
DOCUMENTS = {
    "plain": f"kind: analytic\nmachine: els\n{BANK}",
    "sized": f"kind: analytic\nmachine: els\n{BANK}sizes: {{height: [4, 20], width: [3, 40]}}\n",
    "folded": f"kind: analytic\nmachine: els\npadding: inside\nfold: 0.2\nsizes: any\n{BANK}",
    "inside": f"kind: analytic\nmachine: els\npadding: inside\n{BANK}",
    "local": f"kind: analytic\nmachine: local\npadding: circular\nfold: uniform\n{BANK}",
    "mixed": "kind: analytic\nmachine: els\nbank: ../_banks/mixed.safetensors\nwindow: 3\n"
    "fold: 0.5\nsizes: any\n",
}
MIXED = [(5, 8), (7, 4), (5, 8), (4, 4)]
SIGMA = [0.25, 4.0]
LARGE = (9, 14)
MAX_PIXELS = 2000


def mixed_bank() -> AnyBank:
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (1, *size), np.uint8) for size in MIXED]
    return make_mixed_bank(pictures, [1, 0, 0, 1], label_names=("sea", "hills"))


def images(size: tuple[int, ...] = SHAPE[1:], seed: int = 1) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=(2, 1, *size)).astype(np.float32)
