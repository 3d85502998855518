"""Agreement of images, and medians and means with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from els_service.denoisers.levels import Floats

_RESAMPLES = 10_000
_BLOCK = 1000


@dataclass(frozen=True, eq=False)
class Agreement:
    """Agreement of each image, [N] float64."""

    pearson_r: Floats
    """0 if one of the two images is constant."""
    explained: Floats
    """1 - SSE/SST: 1 for equal images, 0 for one as good as the target's mean, negative for a worse
    one; 0 if the target is constant."""
    mse: Floats
    """Mean squared error of pixels from 0 to 1, that is of (x + 1) / 2, which is not clipped."""

    @property
    def r2(self) -> Floats:
        """The square of ``pearson_r``: explained variance after fitting scale and offset."""
        return self.pearson_r**2


def agreement(predicted: Tensor, target: Tensor) -> Agreement:
    """Return the agreement of ``predicted`` and ``target`` [N, C, H, W], over pixels and channels.

    Raises:
        ValueError: The shapes differ.
    """
    if predicted.shape != target.shape:
        raise ValueError(f"expected images {list(target.shape)}, got {list(predicted.shape)}")
    got, want = (images.double().flatten(1).numpy() for images in (predicted, target))
    error = np.square(got - want).sum(1)
    mse = error / (4 * got.shape[1])
    got, want = (images - images.mean(1, keepdims=True) for images in (got, want))
    total = np.square(want).sum(1)
    size = np.sqrt(np.square(got).sum(1) * total)
    product = (got * want).sum(1)
    pearson_r = np.divide(product, size, out=np.zeros_like(size), where=size > 0)
    unexplained = np.divide(error, total, out=np.ones_like(total), where=total > 0)
    return Agreement(pearson_r, 1 - unexplained, mse)


def median_interval(values: Floats, seed: int = 0) -> tuple[float, float, float]:
    """Return the median and the ends of its 95 % percentile bootstrap interval."""
    return _interval(np.median, values, seed)


def mean_interval(values: Floats, seed: int = 0) -> tuple[float, float, float]:
    """Return the mean and the ends of its 95 % percentile bootstrap interval."""
    return _interval(np.mean, values, seed)


def _interval(
    statistic: Callable[..., Any], values: Floats, seed: int
) -> tuple[float, float, float]:
    draw = np.random.default_rng(seed)
    resampled = [
        statistic(draw.choice(values, (_BLOCK, len(values))), axis=1)
        for _ in range(_RESAMPLES // _BLOCK)
    ]
    low, high = np.quantile(np.concatenate(resampled), (0.025, 0.975))
    return float(statistic(values)), float(low), float(high)
