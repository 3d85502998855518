"""Pairs of patches of one cell of a query, by vertical displacement: the sweep of a fold's moments.

Rows of patches are multiplied as matrices, so that every displacement of columns is computed at
once, and rows are summed along a vertical displacement. With k columns of C channels of a row as
one *strip*::

    product of patches  t_q(u)  = Σ_o strip(q + o)·strip(u + o)            o: rows of a patch
    its adjoint         Σ_u w_q(u)·patch(u)  = strips of the bank, weighted

Both take a factor for each row and column of a patch: 1 for distances, the taps of the fold for
answers. Float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from els_kernels.control import checkpoint
from els_kernels.fold_plan import Cell, FoldQuery
from els_kernels.torch_fold import box_matrix, box_sums, taps_matrix

_LOG2E = math.log2(math.e)
TILE = 1 << 18
"""Numbers of one block of pairs: 2 MiB."""
_NEGLIGIBLE = -150.0
"""Base-2 logarithm of a weight that is 0 in float32."""


class Run(NamedTuple):
    """Neighbouring places of an image that are neighbours in a crop."""

    crop: int
    place: int
    length: int


class CellQuery:
    """Patches of one cell of a query, and the normaliser of their weights.

    Args:
        cell: of the query.
        image: [C, H, W] float64, relative to the centre of the bank.
        query: of the image.
    """

    def __init__(self, cell: Cell, image: Tensor, query: FoldQuery) -> None:
        self.cell, self.query = cell, query
        self.row_runs, self.col_runs = runs(cell.rows.query), runs(cell.cols.query)
        crop = cell.query(image)
        self.strips = strips(crop * (query.a / query.s / query.s * _LOG2E), query.window)
        shape = cell.rows.places, cell.cols.places
        self._peak = image.new_full(shape, -math.inf)
        self._total = image.new_zeros(shape)
        self.expected = image.new_zeros(shape)
        """Σ w·along of each patch, [Q, P]."""
        row_taps, self.col_taps = query.taps(cell)
        self.row_taps = taps_matrix(row_taps, cell.rows.places)
        self.boxes = box_matrix(len(cell.rows.query), query.window).T.to(image)
        """[X, Q]: 1 for the rows of each row of patches, as ``row_taps`` has their taps."""

    def add(self, rows: slice, logits: Tensor, along: Tensor | None = None) -> None:
        """Add pairs [rows, P, M] to the normaliser, and to the mean of a number of each pair."""
        old = self._peak[rows]
        top = torch.maximum(old, logits.amax(-1))
        weights = logits.sub_(top[..., None]).exp2_()
        scale = torch.exp2(old - top)
        self._total[rows] = self._total[rows] * scale + weights.sum(-1)
        if along is not None:
            self.expected[rows] = self.expected[rows] * scale + weights.mul_(along).sum(-1)
        self._peak[rows] = top

    def finish(self) -> None:
        """Turn sums into means, after all pairs were added."""
        self.expected /= self._total

    def weights(self, rows: slice, logits: Tensor) -> Tensor | None:
        """Return the final weights of pairs [rows, P, M], or None where all are negligible."""
        logits = logits.sub_(self._peak[rows][..., None])
        if float(logits.amax()) < _NEGLIGIBLE:
            return None
        return logits.exp2_().div_(self._total[rows][..., None])


class CellPairs:
    """Pairs of the patches of a cell with those of n images of the bank.

    A row of pairs is [P, M]: P patches of the query; M sources, which are n images by U patches of
    a row of the bank, or n images where sources are the same place.

    Args:
        query: of the cell.
        images: [n, C, h, w] float64, relative to the centre of the bank.
    """

    def __init__(self, query: CellQuery, images: Tensor) -> None:
        asked, self._query = query.query, query
        self.cell, self._k, self._narrow = query.cell, asked.window, asked.narrow
        self._keys = self.cell.keys(images)
        height, width = images.shape[2:]
        self._row_runs = runs(self.cell.rows.keys(height))
        self._col_runs = runs(self.cell.cols.keys(width))
        scale = -(asked.a / asked.s) * (asked.a / asked.s) * _LOG2E / 2
        self._bias = box_sums(self._keys.square().sum(1), self._k) * scale
        self.count, self.places = len(images), self._bias.shape[1]
        self.width = 1 if self._narrow else self._bias.shape[2]
        """U, or 1."""

    def displacements(self) -> Iterator[tuple[int, slice]]:
        """Yield vertical displacements with the rows of patches that have them, part by part."""
        rows = self.cell.rows
        step = max(1, TILE // (self.cell.cols.places * self.count * self.width) - self._k + 1)
        low, high = 1 - rows.places, self.places
        if rows.same:
            low, high = rows.offset, rows.offset + 1
        for dy in range(low, high):
            first, last = max(0, -dy), min(rows.places, self.places - dy)
            for start in range(first, last, step):
                yield dy, slice(start, min(last, start + step))

    def reaching(self, dy: int, crop: slice) -> slice:
        """Return the rows of patches of a displacement that reach rows of the crop; or none."""
        return slice(
            max(0, -dy, crop.start - self._k + 1),
            min(self.cell.rows.places, self.places - dy, crop.stop),
        )

    def pixels(self, rows: slice) -> slice:
        """Return the rows of the crop that rows of patches cover."""
        return slice(rows.start, rows.stop + self._k - 1)

    def key_strips(self, dy: int, rows: slice) -> Tensor:
        """Return the strips of the bank that face rows of patches, [X, 1, nU, Ck] or [X, P, n, Ck].

        Pairs are batched over the second axis.
        """
        checkpoint()
        pixels = self.pixels(slice(rows.start + dy, rows.stop + dy))
        found = strips(self._keys[:, :, pixels], self._k)
        if self._narrow:
            return found.permute(1, 2, 0, 3)
        return found.transpose(0, 1).flatten(1, 2)[:, None]

    def products(self, left: Tensor, keys: Tensor, rows: Tensor) -> Tensor:
        """Return the products of patches, [Q, P, M].

        Args:
            left: strips of the query, [X, P, Ck].
            keys: of ``key_strips``.
            rows: factors [X, Q] of the rows of each row of patches.
        """
        batched = left.reshape(len(left), keys.shape[1], -1, left.shape[2])
        each = (batched @ keys.transpose(-1, -2)).flatten(1)
        return (rows.T @ each).view(rows.shape[1], left.shape[1], -1)

    def adjoint(self, weights: Tensor, keys: Tensor) -> Tensor:
        """Return the sums of strips [X, P, Ck] with weights [X, P, M]."""
        batched = weights.reshape(len(weights), keys.shape[1], -1, weights.shape[2])
        return (batched @ keys).flatten(1, 2)

    def logits(self, dy: int, rows: slice, keys: Tensor) -> Tensor:
        """Return the logits of rows of patches, base 2, [rows, P, M]."""
        pixels = self.pixels(rows)
        logits = self.products(
            self._query.strips[pixels], keys, self._query.boxes[pixels, rows]
        )  # fmt: skip
        bias = self._bias[:, rows.start + dy : rows.stop + dy]
        if self._narrow:
            return logits.add_(bias.permute(1, 2, 0))
        logits += bias.transpose(0, 1).flatten(1)[:, None]
        if self.cell.cols.same:
            alone = torch.eye(logits.shape[1], self.width, dtype=torch.bool)
            by_image = logits.view(*logits.shape[:2], -1, self.width)
            by_image.masked_fill_(~alone[:, None], -math.inf)
        return logits

    def add_pixels(self, shift: int, first: int, out: Tensor) -> bool:
        """Add π of some rows of pixels by what is ``shift`` rows below in the images.

        Args:
            shift: row of a source minus row of a pixel.
            first: row of the first pixel.
            out: [rows, W, n, w], or [rows, W, n, 1] where sources are the same place.

        Returns:
            Whether there was anything to add.
        """
        added = False
        for dy, crop, place in self._overlaps(shift):
            start, stop = max(place, first), min(place + crop.stop - crop.start, first + len(out))
            if start >= stop:
                continue
            part = self._spread(dy, slice(crop.start + start - place, crop.start + stop - place))
            if part is not None:
                self._place(part, out[start - first : stop - first])
                added = True
        return added

    def _overlaps(self, shift: int) -> Iterator[tuple[int, slice, int]]:
        """Yield displacements within the crops, rows of the crop, and the place of the first.

        Wrapped axes have several for one displacement of pixels.
        """
        for near in self._query.row_runs:
            for far in self._row_runs:
                dy = shift + (far.crop - far.place) - (near.crop - near.place)
                start = max(near.crop, far.crop - dy)
                stop = min(near.crop + near.length, far.crop + far.length - dy)
                apart = self.cell.rows.same and dy != self.cell.rows.offset
                if start < stop and not apart:
                    yield dy, slice(start, stop), near.place + start - near.crop

    def _place(self, part: Tensor, out: Tensor) -> None:
        """Add columns of the crops [rows, Y, n, Z] to those of the images [rows, W, n, w]."""
        for near in self._query.col_runs:
            cols = slice(near.crop, near.crop + near.length)
            places = slice(near.place, near.place + near.length)
            if self._narrow:
                out[:, places] += part[:, cols]
                continue
            for far in self._col_runs:
                out[:, places, :, far.place : far.place + far.length] += part[
                    :, cols, :, far.crop : far.crop + far.length
                ]

    def _spread(self, dy: int, crop: slice) -> Tensor | None:
        """Return π of rows of the crop by what is vertically displaced, [rows, Y, n, Z].

        Y are the columns of the crop, Z those of the bank's crop, or 1 for the same place.
        """
        rows = self.reaching(dy, crop)
        if rows.start >= rows.stop:
            return None
        weights = self._query.weights(rows, self.logits(dy, rows, self.key_strips(dy, rows)))
        if weights is None:
            return None
        tall = self._query.row_taps[crop, rows] @ weights.flatten(1)
        return self._spread_columns(tall.view(len(tall), -1, self.count, self.width))

    def _spread_columns(self, tall: Tensor) -> Tensor:
        taps, places = self._query.col_taps, tall.shape[1]
        grown = 0 if self._narrow else self._k - 1
        out = tall.new_zeros(len(tall), len(taps), self.count, self.width + grown)
        for o in range(self._k):
            column = taps[o : o + places, o]
            if not column.any():
                continue
            start = 0 if self._narrow else o
            target = out[:, o : o + places, :, start : start + self.width]
            target.addcmul_(tall, column[:, None, None])
        return out


def strips(images: Tensor, window: int) -> Tensor:
    """Return the strips [..., X, P, Ck] of images [..., C, X, Y]: k columns of every channel.

    Of one channel they are a view, whose columns overlap.
    """
    return images.unfold(-1, window, 1).movedim(-4, -2).flatten(-2)


def unstrip(sums: Tensor, channels: int, factors: Tensor) -> Tensor:
    """Return the images [C, X, Y] of strips [X, P, Ck] that overlap, with factors [Y, k]."""
    rows, places, _ = sums.shape
    out = sums.new_zeros(channels, rows, len(factors))
    each = sums.view(rows, places, channels, -1)
    for o in range(factors.shape[1]):
        column = factors[o : o + places, o]
        out[:, :, o : o + places] += each[..., o].movedim(2, 0) * column
    return out


def runs(places: Tensor) -> list[Run]:
    """Return the runs of the places of a crop's rows or columns; -1 is outside the image."""
    found: list[Run] = []
    for crop, place in enumerate(places.tolist()):
        if place < 0:
            continue
        last = found[-1] if found else None
        if last and last.crop + last.length == crop and last.place + last.length == place:
            found[-1] = last._replace(length=last.length + 1)
        else:
            found.append(Run(crop, place, 1))
    return found


def strip_factors(factors: Tensor, places: int) -> Tensor:
    """Return the factors [P, k] of the columns of each strip, of those [Y, k] of a crop."""
    columns = [factors[o : o + places, o] for o in range(factors.shape[1])]
    return torch.stack(columns, 1)


class Block(NamedTuple):
    """Weights π of some rows of pixels by what is ``shift`` rows below in n bank images."""

    shift: int
    rows: slice
    narrow: bool
    """Whether sources are at the pixel's own place."""
    weights: Tensor
    """[rows, W, n, w], or [rows, W, n, 1] if narrow."""


def blocks(queries: Sequence[CellQuery], images: Tensor, pixels: slice) -> Iterator[Block]:
    """Yield all weights of some rows of pixels of a query, block by block.

    Args:
        queries: every cell of the query that reaches them.
        images: [n, C, h, w] float64, relative to the centre of the bank.
        pixels: rows.
    """
    pairs = [CellPairs(query, images) for query in queries]
    query, height = queries[0].query, images.shape[2]
    narrow = query.narrow
    shape = query.size[1], len(images), 1 if narrow else images.shape[3]
    step = max(1, TILE // math.prod(shape))
    for shift in (0,) if narrow else range(1 - pixels.stop, height - pixels.start):
        last = min(pixels.stop, height - shift)
        for start in range(max(pixels.start, -shift), last, step):
            rows = slice(start, min(last, start + step))
            weights = images.new_zeros(rows.stop - rows.start, *shape)
            added = [each.add_pixels(shift, start, weights) for each in pairs]
            if any(added):
                yield Block(shift, rows, narrow, weights)
