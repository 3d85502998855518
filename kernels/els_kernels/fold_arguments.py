"""Validation of the arguments of a fold; errors name the argument, expected and got."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import torch
from torch import Tensor

from els_kernels.arguments import (
    Integers,
    Numbers,
    Ranges,
    check_logits,
    describe,
    image_ranges,
    is_images,
    magnitudes,
    numbers,
    odd_windows,
    positive,
)
from els_kernels.fold_plan import grouped
from els_kernels.geometry import Geometry, max_window
from els_kernels.torch_fold import decoded

LEAST_FOLD = 0.05
"""Smallest ρ apart from 0."""


class FoldArguments(TypedDict):
    """Arguments of the images of a batch of queries beside x: tensors, or lists."""

    a: Numbers
    """Signal scale of each image [B], > 0."""
    s: Numbers
    """Noise scale of each image [B], > 0; see ``PatchAttention``."""
    window: Integers
    """Odd side of each image's patch [B] integers, at most every side of x and of the bank's
    images; up to ``max_window`` if all are of one size."""
    fold: Numbers
    """ρ of each image [B]: 0, or from ``LEAST_FOLD`` to infinity."""
    geometry: Geometry
    """A value of ``FOLD_GEOMETRIES``."""
    ranges: NotRequired[Ranges | None]
    """Half-open ranges of bank images, [B, 2] integers ``lo, hi``; None for all."""


def bank_groups(bank: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return the images in order, those of one size in a row together: [[N, C, H, W], …]."""
    if isinstance(bank, Tensor):
        groups = [bank]
    else:
        expected = (
            "bank: expected float32 images [C, H, W] or groups of them [N, C, H, W], or uint8, all "
            "of equal C, at least one"
        )
        for image in bank:
            if not isinstance(image, Tensor) or image.ndim not in (3, 4):
                raise ValueError(f"{expected}, got {describe(image)}")
        kinds = {(image.ndim, image.shape[-3], image.dtype, image.device) for image in bank}
        if len(kinds) != 1:
            got = ", ".join(describe(image) for image in bank) or "none"
            raise ValueError(f"{expected}, got {got}")
        groups = grouped(bank)
    for group in groups:
        if not (is_images(group) or is_images(group, torch.uint8)) or 0 in group.shape:
            raise ValueError(
                "bank: expected float32 [N, C, H, W], none of them 0, or uint8, got "
                f"{describe(group)}"
            )
    # Native code reads the memory, which lacks the sign of a lazily negated view.
    return [group.resolve_neg().contiguous() for group in groups]


@dataclass(frozen=True)
class BankLimits:
    """Limits of a bank on its queries."""

    images: int
    channels: int
    sizes: frozenset[tuple[int, int]]
    """Heights and widths of its images."""
    largest: float
    """Largest |pixel|."""
    device: torch.device

    def check_query(self, x: Tensor, geometry: Geometry) -> None:
        """Raise ValueError unless x is float32 [B, C, H, W] of a size that the machine answers."""
        channels = f"[B, {self.channels}, H, W]"
        if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != self.channels or 0 in x.shape:
            raise ValueError(f"x: expected shape {channels}, got {describe(x)}")
        if not is_images(x) or x.device != self.device:
            raise ValueError(
                f"x: expected torch.float32 on {self.device}, got {describe(x)} on {x.device}"
            )
        size = (x.shape[2], x.shape[3])
        if geometry.sources == "same" and self.sizes != {size}:
            sizes = " and ".join(f"{h}x{w}" for h, w in sorted(self.sizes))
            raise ValueError(
                "x: expected the size of every image of the bank, as sources are the same place, "
                f"{sizes}, got {size[0]}x{size[1]}"
            )

    def levels(self, x: Tensor, a: Numbers, s: Numbers) -> list[tuple[float, float]]:
        """Return the scales of each image; logits fit a float32, see ``PatchAttention``."""
        scales = positive("a", a, len(x)), positive("s", s, len(x))
        check_logits(magnitudes("x", x), self.largest, math.prod(x.shape[1:]), *scales)
        return list(zip(*scales, strict=True))

    def windows(self, window: Integers, x: Tensor, geometry: Geometry) -> list[int]:
        """Return the windows, odd and at most every side; or ``max_window`` if sizes are equal."""
        sides = [(x.shape[2], x.shape[3]), *self.sizes]
        if len(set(sides)) == 1:
            largest = max_window(geometry, *sides[0])
        else:
            side = min(map(min, sides))
            largest = side - (side + 1) % 2
        return odd_windows(window, len(x), largest)

    def ranges(self, ranges: Ranges | None, batch: int) -> list[tuple[int, int]]:
        """Return the ranges of bank images, all of them by default."""
        return image_ranges(ranges, batch, self.images)


def bank_limits(groups: Sequence[Tensor]) -> BankLimits:
    """Return the limits of a bank; raise ValueError if a pixel is not finite."""
    return BankLimits(
        images=sum(map(len, groups)),
        channels=groups[0].shape[1],
        sizes=frozenset((group.shape[2], group.shape[3]) for group in groups),
        largest=max(_largest(group) for group in groups),
        device=groups[0].device,
    )


def _largest(group: Tensor) -> float:
    """Return the largest |pixel| of stored images; raise ValueError if one is not finite."""
    if group.dtype != torch.uint8:
        return max(magnitudes("bank", group))
    return float(decoded(torch.stack(group.aminmax())).abs().max())


def folds(fold: Numbers, batch: int) -> list[float]:
    """Return ρ of each image: 0, or from ``LEAST_FOLD`` to infinity."""
    values = numbers("fold", fold, batch)
    for value in values:
        # float32 of .05 is a little less in some roundings, and must pass.
        if not (value == 0 or value >= LEAST_FOLD * (1 - 1e-6)):
            raise ValueError(f"fold: expected 0 or at least {LEAST_FOLD}, got {value}")
    return values
