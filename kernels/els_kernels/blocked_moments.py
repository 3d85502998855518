"""Posterior moments of one query image in torch, from the answers of the blocks of a bank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from els_kernels.blocks import Blocks
from els_kernels.geometry import Geometry
from els_kernels.moment_queries import (
    Direction,
    PatchQuery,
    Spread,
    WholeQuery,
    merge_posteriors,
)

_CERTAIN = 1e-3
"""Remaining weight below which a removal is recomputed instead of subtracted."""
MomentKind = Literal["posterior", "vjp", "jvp", "spread"]


class Level(NamedTuple):
    """One query image with its level, window and geometry."""

    x: Tensor
    a: float
    s: float
    window: int
    geometry: Geometry


@dataclass(frozen=True, eq=False)
class MomentPass:
    """A pass over the blocks of a range."""

    kind: MomentKind
    limits: tuple[int, int]
    """Images of the whole bank."""
    inputs: tuple[Tensor, ...] = ()
    """For products the direction; then, but for posteriors, mean and log Σ exp(logit)."""
    top: int = 0
    """Number of sources of a spread."""


Passes = Callable[[Level, MomentPass], list[tuple[Tensor, ...]]]
"""Returns the answer of each block of the range, in order: (mean, log Σ), (product,) or a Spread
whose images are counted from the first of the range in that block."""


def block_answers(
    images: Callable[[int, int], Tensor], blocks: Blocks, level: Level, each: MomentPass
) -> list[tuple[Tensor, ...]]:
    """Return the answer of each block of a process, in order.

    Args:
        images: range of the whole bank, within a block → its images [n, C, H, W].
        blocks: of the process.
        level: the query.
        each: the pass.

    Raises:
        ComputationStoppedError: The current ``Control`` was stopped.
    """
    kind = WholeQuery if level.geometry.whole else PatchQuery
    found: list[tuple[Tensor, ...]] = []
    for lo, hi in blocks.runs(*each.limits):
        query = kind(level.x, level.a, level.s, images(lo, hi), level.window, level.geometry)
        if each.kind == "posterior":
            found.append(query.posterior())
        elif each.kind == "spread":
            found.append(query.spread(each.top, *each.inputs))
        else:
            found.append((query.product(each.kind, *each.inputs),))
    return found


class BlockedQuery:
    """One query image over a range of a bank.

    Args:
        level: the query.
        limits: range of the bank.
        passes: computes a pass over the blocks.
        blocks: all blocks of the bank.
        padded: whether ``evidence`` has a channel of zeros behind, as that of native queries has
            one more.
    """

    def __init__(
        self,
        level: Level,
        limits: tuple[int, int],
        passes: Passes,
        blocks: Blocks,
        *,
        padded: bool = False,
    ) -> None:
        self._level, self._limits, self._passes = level, limits, passes
        self._blocks, self._padded = blocks, padded
        self.known: Tensor | None = None
        """``evidence``, if it was computed before."""

    def evidence(self) -> Tensor:
        """Return the first pass, [C + 1, H, W] float64, or one channel more: mean, log Σ exp."""
        mean, log_sum = self.posterior(*self._limits)
        known = torch.cat([mean, log_sum[None]])
        return torch.cat([known, torch.zeros_like(known[:1])]) if self._padded else known

    def posterior(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """Return the mean [C, H, W] and log Σ exp(logit) [H, W] of a range of images, float64."""
        found = self._passes(self._level, MomentPass("posterior", (lo, hi)))
        return merge_posteriors([(mean, log_sum) for mean, log_sum in found])

    def vjp(self, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and Jᵀg, [C, H, W] float64."""
        return self._product("vjp", cotangent)

    def jvp(self, tangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and J u, [C, H, W] float64."""
        return self._product("jvp", tangent)

    def statistics(self, top: int, images: int, with_shares: bool) -> tuple[Tensor, ...]:
        """Return the fields of ``PosteriorStatistics`` for one image.

        Args:
            top: number of sources.
            images: of the whole bank.
            with_shares: whether shares are returned; [0] otherwise.
        """
        mean, log_sum = self._first_pass()
        given = MomentPass("spread", self._limits, (mean, log_sum), top)
        parts = [Spread(*part) for part in self._passes(self._level, given)]
        second = in_order([part.second for part in parts])
        geometry = self._level.geometry
        if geometry.whole and geometry.sources == "every":
            second -= mean.square()
        starts = [lo for lo, _ in self._blocks.runs(*self._limits)]
        shares = mean.new_zeros(images if with_shares else 0)
        if with_shares:
            lo, hi = self._limits
            shares[lo:hi] = torch.cat([part.shares for part in parts])
        sources, weights = _ranked(parts, starts, top)
        return (
            mean.float(),
            second.clamp_(min=0).float(),
            in_order([part.entropy for part in parts]).clamp_(min=0).float(),
            sources,
            weights.float(),
            shares,
        )

    def without(self, image: int) -> tuple[Tensor, Tensor]:
        """Return the mean without an image and its weight, float64."""
        lo, hi = self._limits
        mean, log_sum = self.posterior(lo, hi)
        if not lo <= image < hi:
            return mean, torch.zeros_like(log_sum)
        if hi - lo == 1:
            raise ValueError("ranges: expected two images or more, one of which stays, got 1")
        own_mean, own_log_sum = self.posterior(image, image + 1)
        weight = (own_log_sum - log_sum).exp().clamp(max=1)
        rest = 1 - weight
        removed = (mean - weight * own_mean) / rest
        if (rest < _CERTAIN).any():
            others = [(lo, image), (image + 1, hi)]
            found = [self.posterior(*each) for each in others if each[0] < each[1]]
            removed = torch.where(rest < _CERTAIN, merge_posteriors(found)[0], removed)
        return removed, weight

    def _first_pass(self) -> tuple[Tensor, Tensor]:
        """Return the mean and log Σ exp(logit) of all images."""
        if self.known is None:
            return self.posterior(*self._limits)
        channels = len(self._level.x)
        return self.known[:channels], self.known[channels]

    def _product(self, kind: Direction, direction: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_sum = self._first_pass()
        given = MomentPass(kind, self._limits, (direction, mean, log_sum))
        parts = self._passes(self._level, given)
        return mean, in_order([product for (product,) in parts])


def in_order(parts: list[Tensor]) -> Tensor:
    """Return the sum of tensors, added in order."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def _ranked(parts: list[Spread], starts: list[int], top: int) -> tuple[Tensor, Tensor]:
    """Return the sources [H, W, top, 3] of the whole bank and weights of the lists of ranges."""
    sources = []
    for part, start in zip(parts, starts, strict=True):
        moved = part.sources.clone()
        moved[..., 0] = torch.where(moved[..., 0] < 0, -1, moved[..., 0] + start)
        sources.append(moved)
    # Stable: of equal weights the earlier stays first.
    weights, order = torch.cat([part.weights for part in parts], -1).sort(
        dim=-1, descending=True, stable=True
    )
    order = order[..., :top, None].expand(-1, -1, -1, 3)
    return torch.cat(sources, -2).gather(2, order), weights[..., :top]
