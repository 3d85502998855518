"""Launches of the kernels of the statistics of a fold, for one query."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from els_kernels.fold_plan import FoldQuery
from els_kernels.triton.cell_moments import LIST_BYTES, ROUNDING
from els_kernels.triton.line_kernels import line_ranking_kernel, line_statistics_kernel
from els_kernels.triton.line_plan import LinePlan, LineSlab
from els_kernels.triton.plane_plan import BLOCK, Chunks, PlaneLevel, chunks, options
from els_kernels.triton.tuning import PROGRAMS, Arch

_SCALE = 2.0**14
"""Factor of weights in half precision."""


class Weights(NamedTuple):
    """Sums of the weights of every pixel."""

    mass: Tensor
    """Σ π, [H, W] float64: 1 but for rounding."""
    entropy: Tensor
    """-Σ π log π, [H, W] float64, in nats."""
    shares: Tensor
    """Σ π of each bank image over all pixels, [N] float64."""
    largest: Tensor
    """[m, H, W] float32: 2^14·π that at least m sources of a pixel reach, falling."""


class LineMoments:
    """Weights of the pixels of one query, with final normalisers.

    Args:
        query: of the image.
        level: its scales.
        groups: the bank.
        arch: architecture whose tuned tiles are used.
        normaliser: largest logit in bits, and Σ 2^(ℓ - largest), of the patch centred at each
            pixel, [2, H, W] float64.
    """

    def __init__(
        self,
        query: FoldQuery,
        level: PlaneLevel,
        groups: Sequence[Tensor],
        arch: Arch,
        normaliser: Tensor,
    ) -> None:
        self._plan, self._groups, self._arch = LinePlan(query), groups, arch
        self._scales = level.tensor().to(query.x.device)
        self._crop = self._plan.cell.query(query.x)
        peak, total = self._plan.patches(normaliser)
        self._peak, self._inverse = peak.float(), (_SCALE / total).float()

    def weights(self, images: int, top: int) -> Weights:
        """Return the sums of the weights.

        Args:
            images: of the whole bank.
            top: number m of ``Weights.largest``.
        """
        size = self._plan.query.size
        mass, surprise = torch.zeros(2, *size, dtype=torch.float64)
        shares = mass.new_zeros(images)
        largest = self._crop.new_zeros(top, *size)
        for part in self._plan.slabs(self._groups):
            sums, peaks, own = self._statistics(part, self._crop[:0], 0, moments=False)
            first = part.slab.first
            shares[first : first + len(own)] = own
            mass += sums[0]
            surprise += sums[1]
            largest = torch.cat([largest, peaks]).topk(top, dim=0).values
        entropy = (surprise / mass + mass.log2()) * math.log(2)
        return Weights(mass, entropy.clamp(min=0), shares, largest)

    def moments(self, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Return Σ π·e and Σ π·e² with e = v - r, [C, H, W] float64, of r [C, H, W] float32."""
        first, second = torch.zeros(2, *reference.shape, dtype=torch.float64)
        for part in self._plan.slabs(self._groups):
            for channel in range(len(reference)):
                centre = self._plan.tiles.split(reference[channel][None], 0.0)
                sums, _, _ = self._statistics(part, centre, channel, moments=True)
                first[channel] += sums[0]
                second[channel] += sums[1]
        return first, second

    def _statistics(
        self, part: LineSlab, centre: Tensor, channel: int, *, moments: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return two sums [2, H, W] float64, peaks of chunks [·, H, W], and shares of images."""
        tiles, size = self._plan.tiles, self._plan.query.size
        work = chunks(part.slab, tiles.count)
        numbers = 2 if moments else 3
        sums = self._crop.new_empty(work.total, tiles.count, numbers, BLOCK, BLOCK)
        shares = self._crop.new_zeros(len(part.slab.keys), work.shifts, tiles.count)
        line_statistics_kernel[(tiles.count, work.shifts, work.images)](
            *self._tensors(part), centre, sums, shares, *self._sizes(part, work), channel,
            CHANNELS=len(self._crop), MOMENTS=int(moments),
            **options("fold moments" if moments else "fold entropy", tiles, self._arch),
        )  # fmt: skip
        every = tiles.joined(sums.transpose(1, 2), size)
        total, peaks = every[:, :2].sum(0, dtype=torch.float64), every[:, 2:].flatten(0, 1)
        return total, peaks, shares.sum((1, 2), dtype=torch.float64)

    def ranked(self, weights: Weights) -> tuple[Tensor, Tensor]:
        """Return the largest weights [m, H, W] float64, falling, and their sources [m, H, W, 3].

        Sources are int64: bank image, row, column; -1 where a pixel has fewer. Those of equal
        weights are in the order of chunks, of images, and of displacements.
        """
        top, *size = weights.largest.shape
        found = self._crop.new_zeros(top, *size)
        sources = torch.full((top, *size, 3), -1)
        # As many chunks have a source that reaches it; 0 is no source.
        least = (weights.largest[-1] * (1 - ROUNDING)).clamp(min=1e-30)
        least = self._plan.tiles.split(least[None], 3e38)
        for part in self._plan.slabs(self._groups):
            listed, places = self._lists(part, least, top)
            order = torch.cat([found, listed]).sort(dim=0, descending=True, stable=True)
            found, chosen = order.values[:top], order.indices[:top]
            every = torch.cat([sources, places])
            sources = every.gather(0, chosen[..., None].expand(-1, -1, -1, 3))
        sources[found == 0] = -1
        return found.double() / _SCALE / weights.mass, sources

    def _lists(self, part: LineSlab, least: Tensor, top: int) -> tuple[Tensor, Tensor]:
        """Return the lists of all chunks, [chunks·m, H, W] weights and [chunks·m, H, W, 3]."""
        tiles, size, slab = self._plan.tiles, self._plan.query.size, part.slab
        most = max(tiles.count, min(PROGRAMS, LIST_BYTES // (8 * top * BLOCK * BLOCK)))
        work = chunks(slab, tiles.count, most)
        weights = self._crop.new_zeros(work.total, tiles.count, top, BLOCK, BLOCK)
        ids = torch.zeros(weights.shape, dtype=torch.int32)
        line_ranking_kernel[(tiles.count, work.shifts, work.images)](
            *self._tensors(part), least, weights, ids, *self._sizes(part, work), top,
            CHANNELS=len(self._crop), **options("fold ranking", tiles, self._arch),
        )  # fmt: skip
        found, which = (
            tiles.joined(each.transpose(1, 2), size).flatten(0, 1) for each in (weights, ids)
        )
        shifts = slab.rows.shifts * slab.cols.shifts
        image = slab.first + which.long() // shifts
        return found, torch.stack([image, *self._plan.places(slab, which.long() % shifts)], -1)

    def _tensors(self, part: LineSlab) -> tuple[Tensor, ...]:
        """Return the tensors of a launch, in the order of ``line_statistics_kernel``."""
        plan = self._plan
        reference = torch.stack(
            [self._padded(self._peak, part, 3e38), self._padded(self._inverse, part, 0.0)]
        )
        return (
            self._padded(self._crop, part, 0.0), part.slab.keys, self._scales, reference,
            plan.row_taps, plan.col_taps, plan.row_classes, plan.col_classes, part.rows, part.cols,
        )  # fmt: skip

    def _padded(self, crop: Tensor, part: LineSlab, fill: float) -> Tensor:
        """Return numbers of a line [..., Q, P] on all tiles, as wide as the keys."""
        above, left = self._plan.before
        below = self._plan.tiles.pixels[0] - above - crop.shape[-2]
        right = part.slab.keys.shape[3] - left - crop.shape[-1]
        return pad(crop, (left, right, above, below), value=fill).contiguous()

    def _sizes(self, part: LineSlab, work: Chunks) -> tuple[int, ...]:
        """Return the sizes of a launch, in the order of ``line_statistics_kernel``."""
        plan, slab, tiles = self._plan, part.slab, self._plan.tiles
        rows, cols = slab.keys.shape[2:]
        return (
            cols, tiles.pixels[0] * cols, rows * cols, plan.query.window,
            len(slab.keys), work.each_image, slab.rows.shifts * slab.cols.shifts, work.each_shift,
            slab.cols.shifts, tiles.step, tiles.cols, tiles.blocks, 0,
        )  # fmt: skip
