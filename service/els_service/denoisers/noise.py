"""Reproducible noise of an image: the same bits in any batch, on any machine and release.

Philox 4x64 keyed by (seed, image index) with the number of the draw in the counter's top word, so
that draws are independent of each other; Box-Muller in float64, rounded once to float32. numpy
guarantees a stable bit stream but not stable distributions, hence the transform here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Noise = Callable[[int], Tensor]
"""Number of the draw (0: the start, i: step i) → standard normal [B, C, H, W], float64."""


def standard_normal(seed: int, image: int, draw: int, count: int) -> npt.NDArray[np.float32]:
    """Return ``count`` standard normal numbers, float32.

    Args:
        seed: 0 ≤ seed < 2⁶⁴.
        image: index of the image within the request, from 0.
        draw: number of the draw, from 0.
        count: how many numbers.
    """
    key = np.array([seed, image], np.uint64)
    counter = np.array([0, 0, 0, draw], np.uint64)
    pairs = (count + 1) // 2
    words = np.random.Philox(key=key, counter=counter).random_raw(2 * pairs) >> np.uint64(11)
    radius = np.sqrt(-2 * np.log((words[0::2] + 1.0) * 2.0**-53))
    angle = 2 * np.pi * (words[1::2] * 2.0**-53)
    normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return normal.ravel()[:count].astype(np.float32)


def seeded_noise(seed: int, count: int, shape: tuple[int, int, int], first: int = 0) -> Noise:
    """Return the noise of images ``first … first + count - 1`` of a seed."""
    size = math.prod(shape)

    def draw(number: int) -> Tensor:
        images = [standard_normal(seed, first + i, number, size) for i in range(count)]
        return torch.from_numpy(np.stack(images)).double().view(count, *shape)

    return draw
