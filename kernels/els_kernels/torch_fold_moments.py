"""Second moments of the posterior of a fold in torch, float64, by vertical displacement.

Jacobian products are linear in the weights of patches, so that each cell is computed by itself:
one pass for normalisers and the mean of what the weights are differentiated along, one for the
products. Entropy and ranking are not: all patches, wrapped or clipped, that join a pixel to a
source are added first, in blocks of rows of pixels with all sources that are ``shift`` rows below.
No pair outlives its block. A large image is answered some rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from els_kernels.default_device import made_on
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
from els_kernels.image_statistics import ImageStatistics
from els_kernels.ranking import Ranking
from els_kernels.torch_fold import bank_centre, decoded, within


class TiledFoldMoments:
    """A bank as it is stored, as groups of images of one size; centred tile by tile."""

    def __init__(self, groups: Sequence[Tensor]) -> None:
        self._groups, self._centre = groups, bank_centre(groups)

    def statistics(self, query: FoldQuery, top: int, shares: bool) -> tuple[Tensor, ...]:
        """Return the fields of ``PosteriorStatistics`` for one image."""
        images = sum(map(len, self._groups))
        answer = ImageStatistics.empty(query.x, images, top, shares=shares)
        with made_on(query.x.device):
            for rows in query.blocks(_row_bytes(query, top)):
                self._add_statistics(query, rows, answer.rows(rows))
        return answer

    def _add_statistics(self, query: FoldQuery, rows: slice, out: ImageStatistics) -> None:
        """Write the statistics of some rows of pixels, and add their part of the shares."""
        cells = self._cells(query, rows)
        for cell in cells:
            for _, images in self._tiles(query.limits, cell):
                pairs = CellPairs(cell, images)
                for dy, patches in pairs.displacements():
                    cell.add(patches, pairs.logits(dy, patches, pairs.key_strips(dy, patches)))
        moments = _Moments(out, rows.start)
        for first, images in self._tiles(query.limits, *cells):
            for block in blocks(cells, images, rows):
                moments.add(block, images, first)
        moments.write(self._centre, query.size[0] * query.size[1])

    def vjp(self, query: FoldQuery, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return D(x) and Jᵀg, [C, H, W] float32."""
        return self._product("vjp", query, cotangent)

    def jvp(self, query: FoldQuery, tangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return D(x) and J u, [C, H, W] float32."""
        return self._product("jvp", query, tangent)

    def _product(
        self, kind: Literal["vjp", "jvp"], query: FoldQuery, direction: Tensor
    ) -> tuple[Tensor, Tensor]:
        with made_on(query.x.device):
            mean, product = (torch.zeros_like(query.x).double() for _ in range(2))
            for rows in query.blocks(_row_bytes(query, 0)):
                for cell in self._cells(query, rows):
                    along = _Along(kind, cell, direction.double())
                    for _, images in self._tiles(query.limits, cell):
                        along.add_to_normaliser(CellPairs(cell, images))
                    cell.finish()
                    for _, images in self._tiles(query.limits, cell):
                        along.add_to_sums(CellPairs(cell, images))
                    for values, out in zip(along.results(), (mean, product), strict=True):
                        cell.cell.scatter(values, out[:, rows], rows.start)
            product *= query.a / query.s / query.s
            return (mean + self._centre).float(), product.float()

    def _cells(self, query: FoldQuery, rows: slice) -> list[CellQuery]:
        image = query.x.double() - query.a * self._centre
        return [CellQuery(cell, image, query) for cell in query.cells(rows)]

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


def _row_bytes(query: FoldQuery, top: int) -> int:
    """Return the bytes that moments hold for a row of pixels: strips, sums, ranked sources."""
    channels, width = query.x.shape[0], query.size[1]
    strips = 4 * channels * query.window
    return 8 * width * (strips + 2 * channels + 4 * top)


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
    """Sums of some rows of pixels over blocks of pairs; relative to the bank's centre.

    Args:
        out: where the statistics of these rows are written.
        first: row of the first of them.
    """

    def __init__(self, out: ImageStatistics, first: int) -> None:
        self._out, self._first = out, first
        self._mean, self._second = (torch.zeros_like(out.mean).double() for _ in range(2))
        self._entropy = torch.zeros_like(out.entropy).double()
        top, (height, width) = out.weights.shape[2], out.entropy.shape
        self._ranking = Ranking(top, height, width, self._mean.device)
        self._shares = self._mean.new_zeros(len(out.shares))

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
        here = slice(rows.start - self._first, rows.stop - self._first)
        self._mean[:, here] += mean.movedim(-1, 0)
        self._second[:, here] += second.movedim(-1, 0)
        self._entropy[here] += torch.special.entr(flat).sum(-1)
        if len(self._shares):
            self._shares[first : first + len(images)] += weights.sum((0, 1, 3))
        columns = None if block.narrow else weights.shape[3]
        self._ranking.add_rows(flat, here, self._first + block.shift, columns, first)

    def write(self, centre: Tensor, pixels: int) -> None:
        """Write the statistics; shares are sums over so many pixels."""
        out = self._out
        out.mean.copy_(self._mean + centre)
        # Float64 of values within the bank's range: exact to 1e-15 of its square.
        out.variance.copy_((self._second - self._mean.square()).clamp_(min=0))
        out.entropy.copy_(self._entropy)
        sources, weights = self._ranking.result()
        out.sources.copy_(sources)
        out.weights.copy_(weights)
        out.shares.add_(self._shares / pixels)
