"""Posterior mean under a Gaussian prior: the reference r of sums of e = v - r.

It is near the posterior mean of a bank at any level, so that little of these sums cancels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from els_kernels.torch_fold import bank_centre, decoded

_TILE = 4096
"""Bank images of which squares are summed together."""


class GaussianPrior:
    """Mean and variance of each channel of a bank.

    Args:
        groups: images of one size each, float32 or uint8 v for v/127.5 − 1.
        largest: largest |pixel|, which no reference exceeds.
    """

    def __init__(self, groups: Sequence[Tensor], largest: float) -> None:
        self._largest = largest
        self._centre = bank_centre(groups)
        squares, pixels = torch.zeros_like(self._centre[:, 0, 0]), 0
        for group in groups:
            for first in range(0, len(group), _TILE):
                gaps = decoded(group[first : first + _TILE]).double() - self._centre
                squares += gaps.square_().sum((0, 2, 3))
            pixels += group.numel() // group.shape[1]
        self._variance = (squares / pixels)[:, None, None]

    def reference(self, x: Tensor, a: float, s: float) -> Tensor:
        """Return r of the pixels of a query [C, H, W], float32."""
        signal = a * a * self._variance
        own = x.double() - a * self._centre
        mean = self._centre + own * (signal / (signal + s * s) / a)
        return mean.clamp(-self._largest, self._largest).float()
