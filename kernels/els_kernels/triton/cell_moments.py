"""Launches of the kernels of posterior moments for one cell of one query."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from els_kernels.triton.cell_planes import CellPlanes
from els_kernels.triton.plane_plan import (
    BLOCK,
    PRODUCT_VALUES,
    Slab,
    chunks,
    options,
    sizes,
    values_of,
)
from els_kernels.triton.product_kernels import jvp_kernel, vjp_kernel
from els_kernels.triton.ranking_kernel import ranking_kernel
from els_kernels.triton.statistics_kernel import statistics_kernel
from els_kernels.triton.tuning import PROGRAMS

LIST_BYTES = 1 << 26
"""Maximum memory of the lists of sources of a launch."""
ROUNDING = 2.0**-18
"""Relative distance below the least logit of a list from which sources are looked at."""


class Entropy(NamedTuple):
    """Sums of the weights of a cell."""

    mass: Tensor
    """Σ w of each patch, [Q, P] float64: 1 but for rounding."""
    entropy: Tensor
    """-Σ w log w of each patch, [Q, P] float64, in nats."""
    shares: Tensor
    """Σ w of each bank image over all patches, [N] float64."""


class CellMoments(CellPlanes):
    """Moments of the posteriors of the patches of a cell.

    References r of pixels are [C, X, Y] for its crop and [C, Q, P] for its patches' centres.
    """

    def own(self, image: Tensor) -> Tensor:
        """Return the places [..., Q, P] of an image [..., H, W] that patches are centred at."""
        rows, cols = self.cell.rows, self.cell.cols
        first, left = rows.first, cols.first
        return image[..., first : first + rows.places, left : left + cols.places]

    @property
    def _half(self) -> int:
        """Row and column of the centre of a patch."""
        return self.cell.rows.window // 2

    def entropy(self, images: int) -> Entropy:
        """Return the sums of the weights; ``images`` are those of the whole bank."""
        mass, surprise = torch.zeros_like(self.total), torch.zeros_like(self.total)
        shares = mass.new_zeros(images)
        for slab in self._slabs():
            sums, own = self._statistics(slab, self._query[:0], 0, moments=False)
            shares[slab.first : slab.first + len(slab.keys)] = own
            mass += sums[0]
            surprise += sums[1]
        surprise = surprise / mass * math.log(2)
        return Entropy(mass, (surprise + self.total.log()).clamp(min=0), shares)

    def moments(self, centre: Tensor) -> tuple[Tensor, Tensor]:
        """Return Σ w·e and Σ w·e² with e = v - r, [C, Q, P] float64.

        Args:
            centre: r of the patches' centres, [C, Q, P] float32.
        """
        first = torch.zeros_like(centre, dtype=torch.float64)
        second = torch.zeros_like(first)
        for slab in self._slabs():
            for channel in range(len(centre)):
                one = self._tiled(centre[channel][None], 0.0)
                sums, _ = self._statistics(slab, one, channel, moments=True)
                first[channel] += sums[0]
                second[channel] += sums[1]
        return first, second

    def _statistics(
        self, slab: Slab, centre: Tensor, channel: int, *, moments: bool
    ) -> tuple[Tensor, Tensor]:
        """Return two sums of each patch, [2, Q, P], and the weights of each image, float64."""
        work = chunks(slab, self._tiles.count)
        sums = self._query.new_empty(work.total, self._tiles.count, 2, BLOCK, BLOCK)
        shares = self._query.new_zeros(len(slab.keys), work.shifts, self._tiles.count)
        statistics_kernel[(self._tiles.count, work.shifts, work.images)](
            self._padded(self._query, slab), slab.keys, self._scales, self._reference(1.0),
            centre, sums, shares, *sizes(self.cell, slab, work, self._tiles),
            self._half, channel,
            CHANNELS=len(self._query), MOMENTS=int(moments),
            **options("moments" if moments else "entropy", self._tiles, self._arch),
        )  # fmt: skip
        total = sums.sum(0, dtype=torch.float64).transpose(0, 1)
        return self._untiled(total), shares.sum((1, 2), dtype=torch.float64)

    def ranked(self, top: int) -> tuple[Tensor, Tensor]:
        """Return the largest weights [m, Q, P] float64, falling, and their sources [m, Q, P, 3].

        Sources are int64: bank image, row, column; -1 where a patch has fewer. Those of equal
        weights are in the order of chunks, of images, and of displacements.
        """
        logits = self._query.new_full((top, *self.peak.shape), -math.inf)
        sources = torch.full((top, *self.peak.shape, 3), -1)
        # As many chunks have a source that reaches it.
        least = self._tops[top - 1]
        least = self._tiled((least - ROUNDING * least.abs())[None], 3e38)
        for slab in self._slabs():
            found, places = self._lists(slab, least, top)
            order = torch.cat([logits, found]).sort(dim=0, descending=True, stable=True)
            logits, chosen = order.values[:top], order.indices[:top]
            every = torch.cat([sources, places])
            sources = every.gather(0, chosen[..., None].expand(-1, -1, -1, 3))
        weights = torch.exp2((logits - self.peak).double()) / self.total
        sources[weights == 0] = -1
        return weights, sources

    def _lists(self, slab: Slab, least: Tensor, top: int) -> tuple[Tensor, Tensor]:
        """Return the lists of all chunks, [chunks·m, Q, P] logits and [chunks·m, Q, P, 3]."""
        count = self._tiles.count
        most = max(count, min(PROGRAMS, LIST_BYTES // (8 * top * BLOCK * BLOCK)))
        work = chunks(slab, count, most)
        shape = work.total, count, top, BLOCK, BLOCK
        logits = self._query.new_full(shape, -math.inf)
        ids = torch.zeros(shape, dtype=torch.int32)
        ranking_kernel[(count, work.shifts, work.images)](
            self._padded(self._query, slab), slab.keys, self._scales, least, logits, ids,
            *sizes(self.cell, slab, work, self._tiles), top,
            CHANNELS=len(self._query), **options("ranking", self._tiles, self._arch),
        )  # fmt: skip
        found, which = (self._untiled(each.transpose(1, 2)).flatten(0, 1) for each in (logits, ids))
        return found, self._sources(slab, which.long())

    def _sources(self, slab: Slab, which: Tensor) -> Tensor:
        """Return bank image, row and column [..., Q, P, 3] of numbers of the ranking kernel."""
        shift = which % (slab.rows.shifts * slab.cols.shifts)
        image = slab.first + which // (slab.rows.shifts * slab.cols.shifts)
        row = torch.arange(self.peak.shape[0])[:, None] + self._half + shift // slab.cols.shifts
        col = torch.arange(self.peak.shape[1]) + self._half + shift % slab.cols.shifts
        row, col = row % slab.rows.length, col % slab.cols.length
        # A number that no source has may lead outside the image.
        row = slab.rows.keys[row.clamp(max=len(slab.rows.keys) - 1)]
        col = slab.cols.keys[col.clamp(max=len(slab.cols.keys) - 1)]
        return torch.stack([image, row, col], -1)

    def jvp(self, tangent: Tensor, reference: Tensor, mean: Tensor, reach: float) -> Tensor:
        """Return Σ w (v - D) ⟨φ, u⟩ of each patch, [C, Q, P] float64.

        Args:
            tangent: u of the crop, [C, X, Y] float32.
            reference: r of the crop.
            mean: D of the patches' centres, [C, Q, P] float32.
            reach: largest |φ - r|.
        """
        bound = float(tangent.abs().amax((1, 2)).sum()) * reach
        factor = power_below(2.0**15, bound)
        out = torch.zeros_like(mean, dtype=torch.float64)
        centre = self._tiled(mean, 0.0)
        for slab in self._slabs():
            left, pixels = self._padded(tangent, slab), self._padded(reference, slab)
            for first, sums in self._products("jvp", slab, factor, centre, left, pixels):
                out[first : first + sums.shape[1]] += self._untiled(sums.transpose(0, 1))
        return out / (factor * self._shrink)

    def vjp(self, cotangent: Tensor, reference: Tensor, mean: Tensor, reach: float) -> Tensor:
        """Return Σ w ⟨g, v - D⟩ φ of each pixel of the crop, [C, X, Y] float64.

        Args:
            cotangent: g of the patches' centres, [C, Q, P] float32.
            reference: r of the crop, [C, X, Y] float32.
            mean: D of the patches' centres.
            reach: largest |v - D|.
        """
        bound = float(cotangent.abs().amax((1, 2)).sum()) * reach
        factor = power_below(2.0**14, bound)
        blocks = self._tiles.count * self._tiles.blocks**2
        parts = torch.zeros(blocks, len(mean), BLOCK, BLOCK, dtype=torch.float64)
        centre, left = self._tiled(mean, 0.0), self._tiled(cotangent, 0.0)
        for slab in self._slabs():
            pixels = self._padded(reference, slab)
            for first, sums in self._products("vjp", slab, factor, centre, left, pixels):
                parts[:, first : first + sums.shape[1]] += sums
        return self._overlapped(parts) / (factor * self._shrink)

    @property
    def _shrink(self) -> float:
        """Factor of a sum over one axis, see ``PlaneLevel``."""
        return float(self._scales[3])

    def _products(
        self,
        kind: Literal["jvp", "vjp"],
        slab: Slab,
        factor: float,
        centre: Tensor,
        direction: Tensor,
        pixels: Tensor,
    ) -> list[tuple[int, Tensor]]:
        """Return the first channel and the sums [blocks, V, 32, 32] float64 of all channels."""
        channels, large = len(self._query), self._tiles.blocks > 1
        kernel: Any = jvp_kernel if kind == "jvp" else vjp_kernel
        blocks = self._tiles.count * (1 if kind == "jvp" else self._tiles.blocks**2)
        work = chunks(slab, blocks)
        scales = torch.cat([self._scales, self._scales.new_tensor([factor])])
        together = values_of(channels, PRODUCT_VALUES[large])
        found = []
        for first in range(0, channels, together):
            values = min(together, channels - first)
            sums = self._query.new_empty(work.total, blocks, values, BLOCK, BLOCK)
            kernel[(blocks, work.shifts, work.images)](
                self._padded(self._query, slab), slab.keys, scales, self._reference(1.0), centre,
                direction, pixels, sums, *sizes(self.cell, slab, work, self._tiles),
                self._half, first,
                CHANNELS=channels, VALUES=values, **options(kind, self._tiles, self._arch),
            )  # fmt: skip
            found.append((first, sums.sum(0, dtype=torch.float64)))
        return found


def power_below(limit: float, bound: float) -> float:
    """Return the power of two by which a number of at most ``bound`` stays below ``limit``."""
    if bound == 0:
        return 1.0
    return 2.0 ** max(-100, min(100, math.floor(math.log2(limit / bound))))
