"""Launches of the plane kernels for one cell of one query: the normaliser, and filtered weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from els_kernels.fold_plan import Cell
from els_kernels.geometry import Geometry
from els_kernels.native.far_queries import MOST_ERROR, is_far
from els_kernels.torch_fold import bank_centre, decoded
from els_kernels.triton.fold_kernels import fold_kernel, normaliser_kernel
from els_kernels.triton.plane_plan import (
    BLOCK,
    FOLD_VALUES,
    PlaneLevel,
    Slab,
    chunks,
    options,
    plane_level,
    sizes,
    slabs,
    tiles,
    values_of,
)
from els_kernels.triton.tuning import Arch

_EMPTY = -3e38
"""Reference of a patch before its first source."""


class BankLevels:
    """Largest pixels of a bank, by which the scales of its queries are chosen.

    Args:
        groups: images of one size each, float32 or uint8 v for v/127.5 − 1.
    """

    def __init__(self, groups: Sequence[Tensor]) -> None:
        self._centre = bank_centre(groups)
        low = torch.stack([decoded(group.amin((0, 2, 3))) for group in groups]).amin(0).double()
        high = torch.stack([decoded(group.amax((0, 2, 3))) for group in groups]).amax(0).double()
        centre = self._centre.flatten()
        self.largest = float(torch.maximum(-low, high).max())
        self._reach = float(torch.maximum(centre - low, high - centre).max())

    def level(self, x: Tensor, a: float, s: float, window: int) -> PlaneLevel:
        """Return the scales of a query [C, H, W]."""
        return plane_level(a, s, window, len(x), float(x.abs().max()), self.largest)

    def is_unresolved(self, x: Tensor, a: float, s: float, window: int) -> bool:
        """Return whether a query is far from the bank, and its logits not exact to ``MOST_ERROR``.

        A logit is wrong by 2^-21 of itself at most: its terms are split into two of 11 bits.
        """
        query = float((x.double() - a * self._centre).abs().max())
        if not is_far(query, self._reach, a, s):
            return False
        gap = query / s + a / s * self._reach
        return 2.0**-21 * len(x) * window * window * gap * gap / 2 > MOST_ERROR


class CellPlanes:
    """Patches of one cell of a query, with the normaliser of their weights.

    Args:
        cell: of the query.
        x: [C, H, W] float32.
        level: of the query.
        groups: the bank.
        limits: half-open range of its images.
        geometry: sources and padding.
        arch: architecture whose tuned tiles are used.
        known: peak and total of an earlier computation, which spare the first pass.
        tops: number of largest peaks of chunks that are kept of each patch.
    """

    def __init__(
        self,
        cell: Cell,
        x: Tensor,
        level: PlaneLevel,
        groups: Sequence[Tensor],
        limits: tuple[int, int],
        geometry: Geometry,
        arch: Arch,
        *,
        known: tuple[Tensor, Tensor] | None = None,
        tops: int = 0,
    ) -> None:
        self.cell, self._groups, self._limits, self._geometry = cell, groups, limits, geometry
        self._query = cell.query(x)
        self._scales = level.tensor().to(x.device)
        self._tiles, self._arch = tiles(cell), arch
        shape = cell.rows.places, cell.cols.places
        self.peak = x.new_full(shape, _EMPTY)
        """[Q, P] float32: the largest logit of each patch, in bits."""
        self.total = torch.zeros(shape, dtype=torch.float64)
        """[Q, P] float64: Σ 2^(ℓ - peak)."""
        self._tops = x.new_full((tops, *shape), _EMPTY)
        if known is not None:
            self.peak, self.total = known
            return
        for slab in self._slabs():
            self._add(slab)

    def _slabs(self) -> Iterator[Slab]:
        return slabs(self._groups, self._limits, self.cell, self._geometry, self._tiles)

    def _padded(self, crop: Tensor, slab: Slab) -> Tensor:
        """Return a crop of the query with zeros up to whole tiles, as wide as the keys."""
        rows = self._tiles.pixels[0] - crop.shape[1]
        cols = slab.keys.shape[3] - crop.shape[2]
        return pad(crop, (0, cols, 0, rows)).contiguous()

    def _add(self, slab: Slab) -> None:
        """Add the sources of a slab to the normaliser, chunk by chunk in order."""
        work = chunks(slab, self._tiles.count)
        peaks = self._query.new_empty(work.total, *self.peak.shape)
        totals = torch.empty_like(peaks)
        normaliser_kernel[(self._tiles.count, work.shifts, work.images)](
            self._padded(self._query, slab), slab.keys, self._scales, peaks, totals,
            *sizes(self.cell, slab, work, self._tiles),
            CHANNELS=len(self._query), **options("normaliser", self._tiles, self._arch),
        )  # fmt: skip
        top = torch.maximum(self.peak, peaks.amax(0))
        self.total *= torch.exp2((self.peak - top).double())
        self.total += (totals * torch.exp2((peaks - top).double())).sum(0)
        self.peak = top
        if len(self._tops):
            self._tops = torch.cat([self._tops, peaks]).topk(len(self._tops), dim=0).values

    def log_sum(self) -> Tensor:
        """Return log Σ exp(logit) of each patch, in nats, float64."""
        return (self.peak.double() + self.total.log2()) * math.log(2)

    def fold(self, row_taps: Tensor, col_taps: Tensor) -> Tensor:
        """Return the folded mean of the crop, [C, X, Y] float64.

        Args:
            row_taps: weights [X, k] of ``Axis.taps``.
            col_taps: weights [Y, k].
        """
        channels = len(self._query)
        reference = self._reference(2.0**14)
        taps = row_taps.float().contiguous(), col_taps.float().contiguous()
        blocks = self._tiles.count * self._tiles.blocks**2
        side = BLOCK
        parts = torch.zeros(blocks, channels, side, side, dtype=torch.float64)
        for slab in self._slabs():
            together = values_of(channels, FOLD_VALUES)
            for first in range(0, channels, together):
                values = min(together, channels - first)
                work = chunks(slab, blocks)
                sums = self._query.new_empty(work.total, blocks, values, side, side)
                fold_kernel[(blocks, work.shifts, work.images)](
                    self._padded(self._query, slab), slab.keys, self._scales, reference, *taps,
                    sums, *sizes(self.cell, slab, work, self._tiles), *self._query.shape[1:], first,
                    CHANNELS=channels, VALUES=values, **options("fold", self._tiles, self._arch),
                )  # fmt: skip
                parts[:, first : first + values] += sums.sum(0, dtype=torch.float64)
        return self._overlapped(parts)

    def _reference(self, scale: float) -> Tensor:
        """Return the peak and the inverse weight of the patches of each tile, [tiles, 2, 32, 32].

        Weights have a factor ``scale``; a patch that a tile does not have weighs 0.
        """
        inverse = (scale / self.total).float()
        return torch.cat([self._tiled(self.peak[None], 3e38), self._tiled(inverse[None], 0.0)], 1)

    def _tiled(self, fields: Tensor, fill: float) -> Tensor:
        """Return numbers of patches [K, Q, P] as [tiles, K, 32, 32]; ``fill`` is no patch's."""
        return self._tiles.split(fields, fill)

    def _untiled(self, tiled: Tensor) -> Tensor:
        """Return numbers of patches [..., Q, P] of those of tiles, [..., tiles, 32, 32]."""
        return self._tiles.joined(tiled, tuple(self.peak.shape))

    def _overlapped(self, parts: Tensor) -> Tensor:
        """Return the crop [C, X, Y] of the blocks of pixels [tiles·blocks², C, side, side]."""
        shape, side = self._tiles, BLOCK
        out = parts.new_zeros(parts.shape[1], *shape.pixels)
        each = parts.view(shape.rows, shape.cols, shape.blocks, shape.blocks, *parts.shape[1:])
        for row in range(shape.rows):
            for col in range(shape.cols):
                for down in range(shape.blocks):
                    for right in range(shape.blocks):
                        top = row * shape.step + down * side
                        left = col * shape.step + right * side
                        out[:, top : top + side, left : left + side] += each[row, col, down, right]
        return out[:, : self._query.shape[1], : self._query.shape[2]]
