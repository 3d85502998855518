"""Pyramids of pictures: sizes of the scales, and resampling between them.

Scales are numbered from 0, the coarsest. Their sides grow by one ratio, about 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

Size = tuple[int, int]
"""Height and width in pixels."""

COARSEST_PATCHES = 1.6
"""Default short side of the coarsest scale, in patches: there a patch sees most of a picture."""
MAX_SCALES = 8


def fitted(size: Size, longest: int) -> Size:
    """Return a size with its proportions and at most ``longest`` pixels on its long side."""
    factor = min(1.0, longest / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def scale_count(finest: Size, coarsest: int) -> int:
    """Return the number of scales whose ratio is nearest to 2, at most ``MAX_SCALES``."""
    if min(finest) <= coarsest:
        return 1
    return min(MAX_SCALES, 1 + round(math.log2(min(finest) / coarsest)))


def scale_sizes(finest: Size, coarsest: int, scales: int) -> tuple[Size, ...]:
    """Return the size of each scale; the coarsest has ``coarsest`` pixels on its short side."""
    if scales == 1:
        return (finest,)
    ratio = min(1.0, coarsest / min(finest)) ** (1 / (scales - 1))
    return tuple(
        (round(finest[0] * ratio**down), round(finest[1] * ratio**down))
        for down in range(scales - 1, -1, -1)
    )


def asked_sizes(model: Sequence[Size], asked: Size, patch: int) -> tuple[Size, ...]:
    """Return the size of each scale of a picture to draw.

    Args:
        model: sizes of the scales of the model.
        asked: size at the finest scale.
        patch: side of a patch; every scale holds one.
    """
    height, width = model[-1]
    return tuple(
        (max(patch, round(asked[0] * h / height)), max(patch, round(asked[1] * w / width)))
        for h, w in model
    )


def resized(images: Tensor, size: Size) -> Tensor:
    """Return images [B, C, H, W] resampled to a size: bicubic, averaging where it is smaller."""
    if images.shape[2:] == size:
        return images
    return interpolate(images, size, mode="bicubic", align_corners=False, antialias=True)


def resized_on_torus(images: Tensor, size: Size) -> Tensor:
    """Return images [B, C, H, W] that repeat on all sides, resampled as by ``resized``."""
    axes = [_margins(old, new) for old, new in zip(images.shape[2:], size, strict=True)]
    (row, new_row), (col, new_col) = axes
    larger = size[0] + 2 * new_row, size[1] + 2 * new_col
    wide = resized(wrapped(images, row, col), larger)
    return wide[..., new_row : new_row + size[0], new_col : new_col + size[1]]


def _margins(old: int, new: int) -> tuple[int, int]:
    """Return how many pixels of an axis to repeat on either side, and how many those become.

    Enough for the filter, which reaches two of the larger pixels; and a whole number of both.
    """
    shared = math.gcd(old, new)
    reach = 3 * max(1.0, old / new)
    count = math.ceil(reach * shared / old)
    return count * old // shared, count * new // shared


def wrapped(images: Tensor, rows: int, cols: int) -> Tensor:
    """Return images with a border in which they repeat, even if they are narrower than that."""
    row = torch.arange(-rows, images.shape[2] + rows) % images.shape[2]
    col = torch.arange(-cols, images.shape[3] + cols) % images.shape[3]
    return images[:, :, row][..., col]


def with_smooth_edges(images: Tensor) -> Tensor:
    """Return images [B, C, H, W] that repeat on all sides, rolled so that their edges are smooth.

    The neighbouring rows that differ least, on average over pixels, become the edges; and columns.
    """
    rolled = []
    for image in images:
        for axis in (1, 2):
            # Entry i: the step to i from its neighbour; that to 0 is from the other edge.
            steps = (image - image.roll(1, axis)).abs().mean(dim=(0, 3 - axis))
            image = image.roll(-int(steps.argmin()), axis)
        rolled.append(image)
    return torch.stack(rolled)


def level_of(taken: int, steps: int) -> tuple[float, float]:
    """Return (α, σ) before the step after ``taken`` steps of one scale; σ = 1 - α.

    α rises linearly from 0, pure noise, to ``1 - LAST_SIGMA``.
    """
    alpha = (1 - LAST_SIGMA) * taken / max(1, steps - 1)
    return alpha, 1 - alpha


LAST_SIGMA = 1e-4
"""σ of the last step of a scale."""


@dataclass(frozen=True, eq=False)
class PyramidPlan:
    """Options of the sampler ``pyramid``.

    Args:
        sizes: size of each scale, the last that of the result.
        patch: side of the model's patches.
        tileable: whether opposite edges meet: patches lie on a torus.
        symmetric: whether the right half mirrors the left.
        mask: [1 or B, 1, H, W] float64: 1 where pixels are drawn, 0 where those of ``start`` are
            kept; None to draw all.
    """

    sizes: tuple[Size, ...]
    patch: int
    tileable: bool = False
    symmetric: bool = False
    mask: Tensor | None = None

    @property
    def scales(self) -> int:
        """Number of scales."""
        return len(self.sizes)

    @property
    def border(self) -> int:
        """Pixels of the border in which a tileable picture repeats in a query; otherwise 0."""
        return self.patch - 1 if self.tileable else 0

    def resized(self, images: Tensor, size: Size) -> Tensor:
        """Return images [B, C, H, W] resampled to a size, on the torus if tileable."""
        return resized_on_torus(images, size) if self.tileable else resized(images, size)

    def pixels(self, scale: int) -> int:
        """Return height × width of a scale; 0 for the one before the first."""
        return math.prod(self.sizes[scale]) if scale >= 0 else 0

    def numbers(self, channels: int) -> int:
        """Return the length of the state of one image: the finest scale, and the one before."""
        return channels * (self.pixels(self.scales - 1) + self.pixels(self.scales - 2))


def unpacked(state: Tensor, plan: PyramidPlan, scale: int, channels: int) -> tuple[Tensor, Tensor]:
    """Return x of a scale and the finished scale before, [B, C, H, W], of a state [B, N]."""
    split = channels * plan.pixels(scale)
    coarse = state[:, split : split + channels * plan.pixels(scale - 1)]
    return (
        state[:, :split].reshape(len(state), channels, *plan.sizes[scale]),
        coarse.reshape(len(state), channels, *plan.sizes[max(0, scale - 1)])
        if scale
        else coarse.reshape(len(state), channels, 0, 0),
    )


def packed(x: Tensor, coarse: Tensor | None, plan: PyramidPlan) -> Tensor:
    """Return the state [B, N] of x of a scale and of the finished scale before, padded by zeros."""
    parts = [x.flatten(1), *([] if coarse is None else [coarse.flatten(1)])]
    state = torch.cat(parts, dim=1)
    return torch.nn.functional.pad(state, (0, plan.numbers(x.shape[1]) - state.shape[1]))
