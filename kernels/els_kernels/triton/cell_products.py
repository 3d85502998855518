"""Launches of the kernels of Jacobian products of a fold, for one cell of one query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from els_kernels.triton.cell_moments import power_below
from els_kernels.triton.cell_planes import CellPlanes
from els_kernels.triton.fold_product_kernels import fold_product_kernel, fold_scalar_kernel
from els_kernels.triton.plane_plan import (
    BLOCK,
    PlaneKernel,
    Slab,
    chunks,
    options,
    sizes,
    tap_blocks,
)

_REFINED = 500.0
"""a/s² from which means are refined: a product is so many times what is left of c."""

Product = Literal["jvp", "vjp"]


@dataclass(frozen=True)
class _Work:
    """Arguments common to the launches of one product."""

    kind: Product
    scales: Tensor
    """[7] float32, as of ``fold_scalar_kernel``."""
    taps: tuple[Tensor, Tensor]
    """Of rows and columns, float16, as of ``fold_scalar_kernel``."""
    direction: Tensor
    """u or g of the crop, [C, X, Y] float32."""
    reference: Tensor
    """r of the crop, [C, X, Y] float32."""


class CellProducts(CellPlanes):
    """Jacobian products of the fold of the patches of a cell."""

    def product(
        self,
        kind: Product,
        direction: Tensor,
        reference: Tensor,
        reach: float,
        gain: float,
        taps: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Return J u or Jᵀg of the crop without the factor a/s², [C, X, Y] float64.

        Args:
            kind: of the product.
            direction: u or g of the crop, [C, X, Y] float32.
            reference: r of the crop, [C, X, Y] float32.
            reach: largest |φ - r|.
            gain: a/s².
            taps: weights of rows [X, k] and columns [Y, k] of the fold.
        """
        window = self.cell.rows.window
        bound = float(direction.abs().amax((1, 2)).sum()) * reach
        # A patch has at most as many taps along an axis as rows, each of at most 1.
        limit = 2.0**15 if kind == "jvp" else 2.0**14 / window
        factor = power_below(limit, bound)
        shrink = float(self._scales[3])
        squeeze = shrink / 4
        scales = torch.cat([self._scales, self._scales.new_tensor([factor, squeeze])])
        rows = self._taps(taps[0], self._tiles.rows)
        cols = self._taps(taps[1], self._tiles.cols).mT
        if kind == "vjp":
            rows, cols = rows.mT, cols.mT
        work = _Work(kind, scales, (rows.contiguous(), cols.contiguous()), direction, reference)
        mean = self._means(work, torch.zeros_like(self.total))
        if gain > _REFINED:
            mean += self._means(work, mean)
        return self._overlapped(self._parts(work, mean)) / (factor * shrink * squeeze)

    def _taps(self, taps: Tensor, count: int) -> Tensor:
        """Return the weights between tiles of patches and the blocks of pixels that they reach.

        [tiles, blocks, 2, 32, 32], pixels by patches.
        """
        first = torch.arange(count)[:, None] * self._tiles.step
        pixels = first + torch.arange(self._tiles.blocks) * BLOCK
        own = BLOCK, self._tiles.step
        return tap_blocks(taps, pixels, first.expand_as(pixels), own)

    def _means(self, work: _Work, centre: Tensor) -> Tensor:
        """Return the mean of c - centre of each patch, [Q, P] float64."""
        mass, total = torch.zeros(2, *self.peak.shape, dtype=torch.float64)
        count, terms = self._tiles.count, self._terms(centre)
        vjp = work.kind == "vjp"
        kernel: PlaneKernel = "fold scalars vjp" if vjp else "fold scalars jvp"
        for slab in self._slabs():
            split = chunks(slab, count)
            sums = self._query.new_empty(split.total, count, 2, BLOCK, BLOCK)
            fold_scalar_kernel[(count, split.shifts, split.images)](
                *self._tensors(work, slab, terms), sums,
                *sizes(self.cell, slab, split, self._tiles),
                CHANNELS=len(self._query), VJP=int(vjp),
                **options(kernel, self._tiles, self._arch),
            )  # fmt: skip
            own = self._untiled(sums.sum(0, dtype=torch.float64).transpose(0, 1))
            mass += own[0]
            total += own[1]
        mean: Tensor = total / mass
        return mean

    def _parts(self, work: _Work, mean: Tensor) -> Tensor:
        """Return the scaled product of every block of pixels, [blocks, C, 32, 32] float64."""
        channels = len(self._query)
        blocks = self._tiles.count * self._tiles.blocks**2
        parts = torch.zeros(blocks, channels, BLOCK, BLOCK, dtype=torch.float64)
        terms, vjp = self._terms(mean), work.kind == "vjp"
        for slab in self._slabs():
            split = chunks(slab, blocks)
            tensors = self._tensors(work, slab, terms)
            for channel in range(channels):
                sums = self._query.new_empty(split.total, blocks, BLOCK, BLOCK)
                fold_product_kernel[(blocks, split.shifts, split.images)](
                    *tensors, sums, *sizes(self.cell, slab, split, self._tiles), channel,
                    CHANNELS=channels, VJP=int(vjp),
                    **options("fold vjp" if vjp else "fold jvp", self._tiles, self._arch),
                )  # fmt: skip
                parts[:, channel] += sums.sum(0, dtype=torch.float64)
        return parts

    def _terms(self, centre: Tensor) -> Tensor:
        """Return numbers of patches [Q, P] as the sum of two float32, [tiles, 2, 32, 32]."""
        high = centre.float()
        return self._tiled(torch.stack([high, (centre - high).float()]), 0.0)

    def _tensors(self, work: _Work, slab: Slab, centre: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of a launch, in the order of ``fold_scalar_kernel``."""
        query, direction, reference = (
            self._padded(crop, slab) for crop in (self._query, work.direction, work.reference)
        )
        return (
            query, slab.keys, work.scales, self._reference(1.0), *work.taps, centre,
            direction, reference,
        )  # fmt: skip
