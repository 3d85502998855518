"""Statistics of the posterior of one image, written block by block."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ImageStatistics(NamedTuple):
    """Fields of ``PosteriorStatistics`` of one image, or of some rows; float32 unless stated."""

    mean: Tensor
    """[C, H, W]."""
    variance: Tensor
    """[C, H, W]."""
    entropy: Tensor
    """[H, W]."""
    sources: Tensor
    """[H, W, top, 3] int64."""
    weights: Tensor
    """[H, W, top]."""
    shares: Tensor
    """[N] float64, of all images of the bank; or [0]."""

    @classmethod
    def empty(cls, x: Tensor, images: int, top: int, *, shares: bool) -> ImageStatistics:
        """Return those of an image like x, to be written; shares are zero.

        Args:
            x: [C, H, W].
            images: of the bank.
            top: number of sources of a pixel.
            shares: whether shares are wanted.
        """
        size = x.shape[1:]
        return cls(
            torch.empty_like(x),
            torch.empty_like(x),
            x.new_empty(size),
            x.new_empty(*size, top, 3, dtype=torch.int64),
            x.new_empty(*size, top),
            x.new_zeros(images if shares else 0, dtype=torch.float64),
        )

    def rows(self, rows: slice) -> ImageStatistics:
        """Return views of some rows, and of the shares of all."""
        mean, variance = self.mean[:, rows], self.variance[:, rows]
        rest = self.entropy[rows], self.sources[rows], self.weights[rows]
        return ImageStatistics(mean, variance, *rest, self.shares)
