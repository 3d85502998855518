"""Masks of coordinates by tiles of the image, so that sums skip what no pixel of a tile sees."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

_TILE = 8
"""Side of a tile in pixels."""
_DENSE = 0.7
"""Share of the work above which one product of whole matrices is faster (measured)."""


def tile_order(shape: tuple[int, int, int]) -> Tensor:
    """Return coordinates of images (C, H, W), [C·H·W] int64, those of a tile one after another."""
    channels, height, width = shape
    coordinates = torch.arange(channels * height * width).view(channels, height, width)
    return torch.cat(
        [
            coordinates[:, top : top + _TILE, left : left + _TILE].flatten()
            for top in range(0, height, _TILE)
            for left in range(0, width, _TILE)
        ]
    )


def tile_sizes(shape: tuple[int, int, int]) -> list[int]:
    """Return the number of coordinates of each tile, in the order of ``tile_order``."""
    channels, height, width = shape
    return [
        channels * min(_TILE, height - top) * min(_TILE, width - left)
        for top in range(0, height, _TILE)
        for left in range(0, width, _TILE)
    ]


@dataclass(frozen=True, eq=False)
class _Tile:
    """Columns [first, last) of a mask, and the rows that have an entry in them.

    Attributes:
        first: first column.
        last: end of the columns.
        rows: [R] int64.
        mask: entries, [R, last - first] float32.
    """

    first: int
    last: int
    rows: Tensor
    mask: Tensor


class TiledMask:
    """A mask M [D, D] of zeros and ones, coordinates in the order of ``tile_order``.

    Args:
        mask: M, [D, D] bool.
        sizes: numbers of coordinates of the tiles, which sum to D.
        device: device of the sums.
    """

    def __init__(self, mask: Tensor, sizes: list[int], device: str) -> None:
        self._tiles: list[_Tile] = []
        self._dense: Tensor | None = None
        bounds = list(itertools.pairwise(itertools.accumulate(sizes, initial=0)))
        rows_of = [mask[:, first:last].any(1).nonzero().flatten() for first, last in bounds]
        work = sum(len(rows) * size for rows, size in zip(rows_of, sizes, strict=True))
        if work > _DENSE * len(mask) ** 2:
            self._dense = mask.float().to(device)
            return
        for (first, last), rows in zip(bounds, rows_of, strict=True):
            part = mask[rows, first:last].float().to(device)
            self._tiles.append(_Tile(first, last, rows.to(device), part))

    def sums(self, values: Tensor) -> Tensor:
        """Return Σ_n values[·, n] M[n, m], [N, D] of [N, D] float32, or [D] of [D]."""
        if self._dense is not None:
            return values @ self._dense.to(values.dtype)
        sums = torch.empty_like(values)
        for tile in self._tiles:
            part = values.index_select(-1, tile.rows) @ tile.mask.to(values.dtype)
            sums[..., tile.first : tile.last] = part
        return sums

    def transposed_sums(self, values: Tensor) -> Tensor:
        """Return Σ_m values[·, m] M[n, m], [N, D] of [N, D] float32."""
        if self._dense is not None:
            return values @ self._dense.T
        sums = torch.zeros_like(values)
        for tile in self._tiles:
            part = values[..., tile.first : tile.last] @ tile.mask.T
            sums.index_add_(-1, tile.rows, part)
        return sums
