"""Lines of a query for the statistics of a fold, and tiles of the pixels that are answered.

A tile has every patch that reaches one of its pixels. Its first patch starts k - 1 before its first
pixel, so that a line starts with as many more rows as it lacks there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from els_kernels.fold_plan import OUTSIDE, Cell, FoldQuery
from els_kernels.native.fold_lines import Line, line
from els_kernels.triton.plane_plan import BLOCK, Ring, Slab, Tiles, slabs, tap_blocks

_NO_PATCH = -2
"""Class of a key that is no patch; no patch of a query has it."""


@dataclass(frozen=True)
class LineTiles(Tiles):
    """Tiles of answered pixels; ``step`` is their side."""

    window: int

    @property
    def reach(self) -> int:
        """Side of the pixels of all patches of a tile."""
        if self.blocks == 1:
            # Blocks of pixels and their values start at the first answered one.
            return BLOCK + self.window - 1
        return (2 * self.blocks - 1) * BLOCK

    @property
    def patches(self) -> int:
        """Side of the patches of a block."""
        return BLOCK - self.window + 1 if self.blocks == 1 else BLOCK


def line_tiles(size: tuple[int, int], window: int) -> LineTiles:
    """Return the tiles of an image: in one block of patches, if half of it is answered or all."""
    halo = window - 1
    most = BLOCK - 2 * halo
    single = most >= BLOCK // 2 or max(size) <= most
    step = most if single else BLOCK
    blocks = 1 if single else -(-(BLOCK + halo) // BLOCK)
    rows, cols = (-(-length // step) for length in size)
    return LineTiles(blocks, step, rows, cols, window)


class LineSlab(NamedTuple):
    """Bank images of one size in one launch, with the classes of their patches."""

    slab: Slab
    rows: Tensor
    """int32: classes of the patches that start at the rows of ``slab.keys``."""
    cols: Tensor


class LinePlan:
    """Lines and tiles of one query.

    Args:
        query: image with its level, window, fold and geometry.
    """

    def __init__(self, query: FoldQuery) -> None:
        self.query = query
        height, width = query.size
        self.rows = line(height, query.window, query.geometry)
        self.cols = line(width, query.window, query.geometry)
        self.tiles = line_tiles(query.size, query.window)
        self.cell = Cell(self.rows.axis, self.cols.axis)
        halo = query.window - 1
        self.before = halo - self.rows.first, halo - self.cols.first
        """Rows and columns of a tile before the lines."""
        self.row_classes, self.col_classes = (
            padded(one.classes(), before, n, OUTSIDE)
            for one, before, n in zip(
                (self.rows, self.cols), self.before, self.tiles.pixels, strict=True
            )
        )
        rows, cols = query.taps(self.cell)
        self.row_taps = self._taps(rows, self.rows, self.tiles.rows)
        self.col_taps = self._taps(cols, self.cols, self.tiles.cols).mT.contiguous()

    def _taps(self, taps: Tensor, one: Line, count: int) -> Tensor:
        """Return the weights between the pixels of tiles and their blocks of patches.

        [tiles, blocks, 2, 32, 32], pixels by patches.
        """
        tiles, image = self.tiles, one.image
        halo = tiles.window - 1
        # From the first patch of the first tile on, so that the first pixel is ``halo`` rows later.
        answered = pad(taps[image], (0, 0, halo, 0))
        first = torch.arange(count)[:, None] * tiles.step
        patches = first + torch.arange(tiles.blocks) * BLOCK
        pixels = (first + halo).expand_as(patches)
        return tap_blocks(answered, pixels, patches, (tiles.step, tiles.patches))

    def slabs(self, groups: Sequence[Tensor]) -> Iterator[LineSlab]:
        """Yield the images of the query's range, slab by slab."""
        query = self.query
        for slab in slabs(groups, query.limits, self.cell, query.geometry, self.tiles, self.before):
            height, width = slab.keys.shape[2:]
            rows = _key_classes(self.rows, slab.rows, self.before[0], height)
            cols = _key_classes(self.cols, slab.cols, self.before[1], width)
            yield LineSlab(slab, rows, cols)

    def patches(self, image: Tensor) -> Tensor:
        """Return the numbers [..., Q, P] of the lines' patches of those of an image [..., H, W]."""
        rows, cols = (
            (torch.arange(one.axis.places) + one.axis.first) % one.length
            for one in (self.rows, self.cols)
        )
        return image[..., rows, :][..., cols]

    def places(self, slab: Slab, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Return row and column of the sources of pixels at displacements [..., H, W], int64."""
        height, width = self.query.size
        row = torch.arange(height)[:, None] + self.rows.first + shift // slab.cols.shifts
        col = torch.arange(width) + self.cols.first + shift % slab.cols.shifts
        return _place(slab.rows, row), _place(slab.cols, col)


def _place(ring: Ring, row: Tensor) -> Tensor:
    """Return the place of the image of a row of a ring, of which it may be behind the end.

    What is never a source may lead outside of the image.
    """
    return ring.keys[(row % ring.length).clamp(max=len(ring.keys) - 1)]


def _key_classes(one: Line, ring: Ring, before: int, count: int) -> Tensor:
    """Return the classes of the patches that start at ``count`` rows of continued keys, int32."""
    known = one.key_line(ring.image).classes
    classes = torch.full((ring.length,), _NO_PATCH, dtype=torch.int32)
    classes[: ring.sources] = known[: ring.sources]
    return classes[ring.rows(count - ring.shifts + 1, before)].contiguous()


def padded(values: Tensor, before: int, length: int, fill: float) -> Tensor:
    """Return numbers [P] from ``before`` rows earlier on, as many as ``length``."""
    return pad(values, (before, length - before - len(values)), value=fill)
