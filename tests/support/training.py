"""Images for tests of training."""

from __future__ import annotations

from typing import Any

import numpy as np

IMAGES = 48


def bars(images: int = IMAGES) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Horizontal and vertical bars, labels 0 and 1."""
    pixels = np.zeros((images, 8, 8), np.uint8)
    labels = np.arange(images) % 2
    for i, label in enumerate(labels):
        place = i // 2 % 8
        pixels[(i, place) if label == 0 else (i, slice(None), place)] = 255
    return pixels, labels
