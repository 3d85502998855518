"""Validation of what a fold is asked for; errors name the argument, expected and got."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from els_kernels.attention import (
    _REACH,
    _describe,
    _integers,
    _is_images,
    _magnitudes,
    _positive,
)
from els_kernels.fold_plan import grouped
from els_kernels.geometry import Geometry, max_window

LEAST_FOLD = 0.05
"""Smallest ρ apart from 0."""


def bank_groups(bank: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return the images in order, those of one size in a row together: [[N, C, H, W], …]."""
    if isinstance(bank, Tensor):
        groups = [bank]
    else:
        expected = "bank: expected float32 images [C, H, W] of equal C, at least one"
        for image in bank:
            if not isinstance(image, Tensor) or image.ndim != 3:
                raise ValueError(f"{expected}, got {_describe(image)}")
        if len({(image.shape[0], image.dtype, image.device) for image in bank}) != 1:
            got = ", ".join(_describe(image) for image in bank) or "none"
            raise ValueError(f"{expected}, got {got}")
        groups = grouped(bank)
    for group in groups:
        if not _is_images(group) or 0 in group.shape:
            raise ValueError(
                f"bank: expected float32 [N, C, H, W], none of them 0, got {_describe(group)}"
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
            raise ValueError(f"x: expected shape {channels}, got {_describe(x)}")
        if not _is_images(x) or x.device != self.device:
            raise ValueError(
                f"x: expected torch.float32 on {self.device}, got {_describe(x)} on {x.device}"
            )
        size = (x.shape[2], x.shape[3])
        if geometry.sources == "same" and self.sizes != {size}:
            sizes = " and ".join(f"{h}x{w}" for h, w in sorted(self.sizes))
            raise ValueError(
                "x: expected the size of every image of the bank, as sources are the same place, "
                f"{sizes}, got {size[0]}x{size[1]}"
            )

    def levels(self, x: Tensor, a: Tensor, s: Tensor) -> list[tuple[float, float]]:
        """Return the scales of each image; logits fit a float32, see ``PatchAttention``."""
        pairs = list(zip(_positive("a", a, len(x)), _positive("s", s, len(x)), strict=True))
        root = math.sqrt(math.prod(x.shape[1:]))
        for size, (a_b, s_b) in zip(_magnitudes("x", x), pairs, strict=True):
            # This order of operations avoids overflow: s may be 1e-300.
            reach = max((size + a_b * self.largest) * root, a_b)
            if reach > _REACH * s_b:
                raise ValueError(
                    "s: expected noise at which logits fit a float32, "
                    f"s >= {reach / _REACH:.1e} here, got {s_b}"
                )
        return pairs

    def windows(self, window: Tensor, x: Tensor, geometry: Geometry) -> list[int]:
        """Return the windows, odd and at most every side; or ``max_window`` if sizes are equal."""
        sides = [(x.shape[2], x.shape[3]), *self.sizes]
        if len(set(sides)) == 1:
            largest = max_window(geometry, *sides[0])
        else:
            side = min(map(min, sides))
            largest = side - (side + 1) % 2
        windows = _integers("window", window, (len(x),))
        for k in windows:
            if k % 2 == 0 or not 1 <= k <= largest:
                raise ValueError(f"window: expected odd from 1 to {largest}, got {k}")
        return windows

    def ranges(self, ranges: Tensor | None, batch: int) -> list[tuple[int, int]]:
        """Return the ranges of bank images, all of them by default."""
        if ranges is None:
            return [(0, self.images)] * batch
        ends = _integers("ranges", ranges, (batch, 2))
        limits = list(zip(ends[::2], ends[1::2], strict=True))
        for lo, hi in limits:
            if not 0 <= lo < hi <= self.images:
                raise ValueError(
                    f"ranges: expected 0 <= lo < hi <= {self.images}, got lo {lo}, hi {hi}"
                )
        return limits


def bank_limits(groups: Sequence[Tensor]) -> BankLimits:
    """Return the limits of a bank; raise ValueError if a pixel is not finite."""
    return BankLimits(
        images=sum(map(len, groups)),
        channels=groups[0].shape[1],
        sizes=frozenset((group.shape[2], group.shape[3]) for group in groups),
        largest=max(max(_magnitudes("bank", group)) for group in groups),
        device=groups[0].device,
    )


def folds(fold: Tensor, batch: int) -> list[float]:
    """Return ρ of each image: 0, or from ``LEAST_FOLD`` to infinity."""
    if not isinstance(fold, Tensor) or fold.shape != (batch,) or fold.is_complex():
        raise ValueError(f"fold: expected numbers [{batch}], got {_describe(fold)}")
    values = [float(value) for value in fold.tolist()]
    for value in values:
        # float32 of .05 is a little less in some roundings, and must pass.
        if not (value == 0 or value >= LEAST_FOLD * (1 - 1e-6)):
            raise ValueError(f"fold: expected 0 or at least {LEAST_FOLD}, got {value}")
    return values
