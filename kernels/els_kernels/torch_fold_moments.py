"""Second moments of the posterior of a fold in torch, float64, by vertical displacement.

Jacobian products are linear in the weights of patches, so that each cell is computed by itself:
one pass for normalisers and the mean of what the weights are differentiated along, one for the
products. Entropy and ranking are not: all patches, wrapped or clipped, that join a pixel to a
source are added first, in blocks of rows of pixels with all sources that are ``shift`` rows below.
No pair outlives its block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from els_kernels.fold_pairs import (
    TILE,
    Block,
    CellPairs,
    CellQuery,
    blocks,
    strip_factors,
    strips,
    unstrip,
)
from els_kernels.fold_plan import FoldQuery
from els_kernels.ranking import Ranking
from els_kernels.torch_fold import bank_centre, decoded, within


class TiledFoldMoments:
    """A bank as it is stored, as groups of images of one size; centred tile by tile."""

    def __init__(self, groups: Sequence[Tensor]) -> None:
        self._groups, self._centre = groups, bank_centre(groups)

    def statistics(self, query: FoldQuery, top: int, shares: bool) -> tuple[Tensor, ...]:
        """Return the fields of ``PosteriorStatistics`` for one image."""
        with torch.device(query.x.device):
            cells = self._cells(query)
            for cell in cells:
                for _, images in self._tiles(query.limits, cell):
                    pairs = CellPairs(cell, images)
                    for dy, rows in pairs.displacements():
                        cell.add(rows, pairs.logits(dy, rows, pairs.key_strips(dy, rows)))
            moments = _Moments(query.x.shape, sum(map(len, self._groups)), top)
            for first, images in self._tiles(query.limits, *cells):
                for block in blocks(cells, images, query.size):
                    moments.add(block, images, first)
            return moments.result(self._centre, shares)

    def vjp(self, query: FoldQuery, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return D(x) and Jᵀg, [C, H, W] float32."""
        return self._product("vjp", query, cotangent)

    def jvp(self, query: FoldQuery, tangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return D(x) and J u, [C, H, W] float32."""
        return self._product("jvp", query, tangent)

    def _product(
        self, kind: Literal["vjp", "jvp"], query: FoldQuery, direction: Tensor
    ) -> tuple[Tensor, Tensor]:
        with torch.device(query.x.device):
            mean, product = (torch.zeros_like(query.x).double() for _ in range(2))
            for cell in self._cells(query):
                along = _Along(kind, cell, direction.double())
                for _, images in self._tiles(query.limits, cell):
                    along.add_to_normaliser(CellPairs(cell, images))
                cell.finish()
                for _, images in self._tiles(query.limits, cell):
                    along.add_to_sums(CellPairs(cell, images))
                for values, out in zip(along.results(), (mean, product), strict=True):
                    cell.cell.scatter(values, out)
            product *= query.a / query.s / query.s
            return (mean + self._centre).float(), product.float()

    def _cells(self, query: FoldQuery) -> list[CellQuery]:
        image = query.x.double() - query.a * self._centre
        return [CellQuery(cell, image, query) for cell in query.cells()]

    def _tiles(self, limits: tuple[int, int], *cells: CellQuery) -> Iterator[tuple[int, Tensor]]:
        """Yield images [n, C, h, w] float64, and the index of the first in the bank."""
        first = limits[0]
        for group in within(self._groups, limits):
            together = min(_together(cell, group.shape[2:]) for cell in cells)
            for start in range(0, len(group), together):
                tile = group[start : start + together]
                yield first + start, decoded(tile).double() - self._centre
            first += len(group)


def _together(cell: CellQuery, size: tuple[int, ...]) -> int:
    """Return the bank images of a size whose pairs of one displacement fit in a tile."""
    rows, cols = cell.cell.rows, cell.cell.cols
    width = 1 if cell.query.narrow else size[1]
    return max(1, TILE // (len(rows.query) * len(cols.query) * width))


class _Along:
    """Jacobian product of one cell; factors of rows and columns are those of the fold or 1.

    Patches of the bank are multiplied by a direction: by that of the query (``jvp``), or by that of
    the answer, with the fold's taps (``vjp``). The differential of the weights then makes a mean
    patch: with the taps (``jvp``), or for the query (``vjp``).
    """

    def __init__(self, kind: Literal["vjp", "jvp"], query: CellQuery, direction: Tensor) -> None:
        self._query, self._channels = query, len(direction)
        found = strips(query.cell.query(direction), query.query.window)
        taps, ones = (
            (query.row_taps, query.col_taps),
            (query.boxes, torch.ones_like(query.col_taps)),
        )
        (self._in_rows, in_cols), (self._out_rows, self._out_cols) = (
            (taps, ones) if kind == "vjp" else (ones, taps)
        )
        # Not in place: strips of one channel are views that overlap.
        factors = strip_factors(in_cols, found.shape[1]).repeat(1, self._channels)
        self._strips = found * factors
        self._mean = torch.zeros_like(query.strips)
        self._product = torch.zeros_like(query.strips)

    def _along(self, pairs: CellPairs, rows: slice, keys: Tensor) -> Tensor:
        pixels = pairs.pixels(rows)
        return pairs.products(self._strips[pixels], keys, self._in_rows[pixels, rows])

    def add_to_normaliser(self, pairs: CellPairs) -> None:
        for dy, rows in pairs.displacements():
            keys = pairs.key_strips(dy, rows)
            along = self._along(pairs, rows, keys)
            self._query.add(rows, pairs.logits(dy, rows, keys), along)

    def add_to_sums(self, pairs: CellPairs) -> None:
        query = self._query
        for dy, rows in pairs.displacements():
            keys, pixels = pairs.key_strips(dy, rows), pairs.pixels(rows)
            weights = query.weights(rows, pairs.logits(dy, rows, keys))
            if weights is None:
                continue
            along = self._along(pairs, rows, keys).sub_(query.expected[rows][..., None])
            for out, factors, each in (
                (self._mean, query.row_taps, weights),
                (self._product, self._out_rows, along.mul_(weights)),
            ):
                spread = factors[pixels, rows] @ each.flatten(1)
                out[pixels] += pairs.adjoint(spread.view(-1, *each.shape[1:]), keys)

    def results(self) -> tuple[Tensor, Tensor]:
        """Return the mean and the product of the crop, [C, X, Y]."""
        return (
            unstrip(self._mean, self._channels, self._query.col_taps),
            unstrip(self._product, self._channels, self._out_cols),
        )


class _Moments:
    """Sums of one query image over blocks of pairs of pixels; relative to the bank's centre.

    Args:
        shape: of the image, [C, H, W].
        images: of the whole bank.
        top: number of sources of a pixel.
    """

    def __init__(self, shape: tuple[int, ...], images: int, top: int) -> None:
        _, height, width = shape
        self._mean, self._second = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
        self._entropy = torch.zeros(height, width, dtype=torch.float64)
        self._shares = torch.zeros(images, dtype=torch.float64)
        self._ranking = Ranking(top, height, width, self._mean.device)

    def add(self, block: Block, images: Tensor, first: int) -> None:
        """Add the weights of a block of pixels.

        Args:
            block: weights of pixels of the query by pixels of the images.
            images: [n, C, h, w].
            first: index in the bank of the first of them.
        """
        weights, rows = block.weights, block.rows
        below = slice(rows.start + block.shift, rows.stop + block.shift)
        values = images[:, :, below]
        flat = weights.flatten(2)
        if block.narrow:
            each = values.permute(2, 3, 0, 1)
            mean, second = ((flat[:, :, None] @ v)[:, :, 0] for v in (each, each.square()))
        else:
            each = values.permute(2, 0, 3, 1).flatten(1, 2)
            mean, second = (flat @ v for v in (each, each.square()))
        self._mean[:, rows] += mean.movedim(-1, 0)
        self._second[:, rows] += second.movedim(-1, 0)
        self._entropy[rows] += torch.special.entr(flat).sum(-1)
        self._shares[first : first + len(images)] += weights.sum((0, 1, 3))
        self._ranking.add_rows(
            flat, rows, block.shift, None if block.narrow else weights.shape[3], first
        )

    def result(self, centre: Tensor, with_shares: bool) -> tuple[Tensor, ...]:
        """Return the fields of ``PosteriorStatistics``."""
        # Float64 of values within the bank's range: exact to 1e-15 of its square.
        variance = (self._second - self._mean.square()).clamp_(min=0)
        sources, weights = self._ranking.result()
        shares = self._shares / self._entropy.numel()
        return (
            (self._mean + centre).float(),
            variance.float(),
            self._entropy.float(),
            sources,
            weights.float(),
            shares if with_shares else shares[:0],
        )
