"""Cells of a fold: crops in which every patch fits, so that kernels need neither padding nor masks.

In a cell the patches of a query crop are those wholly inside it, and so are the patches of the
crops of the bank; each attends to all of the others, or along an axis to the *same* place alone.
The paddings differ by their crops only. Along one axis, with r = k // 2::

    inside      the image                 the bank's image                        every place
    circular    r more on either side,    r more on either side, cyclically       every place
                cyclically
    valid       as circular               the bank's image                        every place
    zeros       the image                 the bank's image                        every place
                its first r places with r zeros before, and the same at its end   same place

A weight of the fold is a product of one factor for each axis, and so is its normaliser: ``taps``
holds the normalised factors of one axis.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from els_kernels.geometry import Geometry, group_by

OUTSIDE = -1
"""Index of a row or column of a crop that is outside the image: zero."""
_BLOCK_BYTES = 24 << 20
"""Of the moments of a block of rows of pixels, beside the bank and the answer."""


class FoldQuery(NamedTuple):
    """Validated arguments of one image."""

    x: Tensor
    """[C, H, W] float32."""
    a: float
    """Signal scale."""
    s: float
    """Noise scale."""
    window: int
    """Odd side of the patch."""
    limits: tuple[int, int]
    """Half-open range of bank images."""
    fold: float
    """ρ."""
    geometry: Geometry
    """Sources and padding."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.x.shape[1], self.x.shape[2]

    @property
    def narrow(self) -> bool:
        """Whether a pixel's sources are at its own place: one a bank image."""
        return self.geometry.sources == "same"

    def cells(self, rows: slice | None = None) -> Iterator[Cell]:
        """Yield the cells of the image; or the parts of them that reach some rows of pixels."""
        return cells(*self.size, self.window, self.geometry, rows)

    def blocks(self, row_bytes: int) -> list[slice]:
        """Return blocks of rows of pixels, so that what is held for one at a time is bounded.

        Args:
            row_bytes: bytes that are held for each row.
        """
        height = self.size[0]
        # Neighbouring blocks have the patches of window - 1 rows in common.
        most = max(_BLOCK_BYTES // row_bytes, 2 * self.window)
        count = -(-height // most)
        ends = [height * i // count for i in range(count + 1)]
        return [slice(*pair) for pair in itertools.pairwise(ends)]

    def taps(self, cell: Cell) -> tuple[Tensor, Tensor]:
        """Return the weights of the fold along rows and columns of a cell: see ``Axis.taps``."""
        rows, cols = (
            axis.taps(length, self.fold, self.geometry)
            for axis, length in zip((cell.rows, cell.cols), self.size, strict=True)
        )
        return rows, cols


@dataclass(frozen=True)
class Axis:
    """One axis of a cell."""

    query: Tensor
    """int64 [X]: the place of the image in each row of the query crop; -1 outside the image."""
    keys: Callable[[int], Tensor]
    """Length of a bank image → the same for its crop."""
    first: int
    """Place of the image at which the first patch is centred."""
    same: bool
    """Whether patches attend to the same place only."""
    window: int
    offset: int = 0
    """Patches of the whole axis before the first of this part of it."""

    @property
    def places(self) -> int:
        """Number of query patches."""
        return len(self.query) - self.window + 1

    def reaching(self, places: slice) -> list[Axis]:
        """Return the parts of this axis whose patches reach some places of the image, in order."""
        wanted = (self.query >= places.start) & (self.query < places.stop)
        reach = wanted.unfold(0, self.window, 1).any(1).tolist()
        parts, first = [], 0
        for reaches, run in itertools.groupby(reach):
            last = first + len(list(run))
            if reaches:
                parts.append(self.part(first, last))
            first = last
        return parts

    def part(self, first: int, last: int) -> Axis:
        """Return the axis of patches ``first`` to ``last`` alone."""
        query = self.query[first : last + self.window - 1]
        return replace(self, query=query, first=self.first + first, offset=self.offset + first)

    def taps(self, length: int, fold: float, geometry: Geometry) -> Tensor:
        """Return the weights of the fold along this axis, [X, k] float64.

        Entry ``[p, o]`` is that of row p in the patch that starts at row p - o; 0 where there is no
        such patch. Over all cells the entries of a place of the image sum to 1.
        """
        start = torch.arange(len(self.query))[:, None] - torch.arange(self.window)
        here = (start >= 0) & (start < self.places) & (self.query[:, None] != OUTSIDE)
        factors = _factors(length, self.window, fold, geometry)[self.query]
        return factors * here


@dataclass(frozen=True)
class Cell:
    """Patches of the query with the patches of the bank that they attend to."""

    rows: Axis
    cols: Axis

    def query(self, image: Tensor) -> Tensor:
        """Return the crop of an image [C, H, W]."""
        return crop(image, self.rows.query, self.cols.query)

    def keys(self, images: Tensor) -> Tensor:
        """Return the crops of bank images [N, C, H, W]."""
        height, width = images.shape[-2:]
        return crop(images, self.rows.keys(height), self.cols.keys(width))

    def scatter(self, values: Tensor, out: Tensor, first: int = 0) -> None:
        """Add values of the crop [C, X, Y] to the places of an image that they belong to.

        Args:
            values: of the crop.
            out: rows of the image from ``first`` on, [C, H, W].
            first: row.
        """
        rows, cols = self.rows.query - first, self.cols.query
        inside = (self.rows.query != OUTSIDE) & (rows >= 0) & (rows < out.shape[1])
        values = values[:, inside][:, :, cols != OUTSIDE]
        rows, cols = rows[inside], cols[cols != OUTSIDE]
        tall = values.new_zeros(len(values), out.shape[1], len(cols)).index_add_(1, rows, values)
        out.index_add_(2, cols, tall)


def crop(images: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Return rows and columns of images [..., H, W] by their places; ``OUTSIDE`` is zero."""
    chosen = images[..., rows.clamp(min=0), :][..., cols.clamp(min=0)]
    inside = (rows != OUTSIDE)[:, None] & (cols != OUTSIDE)
    return chosen if bool(inside.all()) else chosen * inside


def cells(
    height: int, width: int, window: int, geometry: Geometry, rows: slice | None = None
) -> Iterator[Cell]:
    """Yield the cells of a query; together their patches are all patches of the query, once.

    Args:
        height: of the query.
        width: of the query.
        window: side of a patch.
        geometry: sources and padding.
        rows: of pixels, for the patches that reach them alone.
    """
    for axis in _axes(height, window, geometry):
        for part in [axis] if rows is None else axis.reaching(rows):
            for cols in _axes(width, window, geometry):
                yield Cell(part, cols)


def _axes(length: int, window: int, geometry: Geometry) -> list[Axis]:
    return _axes_on(length, window, geometry, torch.get_default_device())


@functools.lru_cache(maxsize=256)
def _axes_on(length: int, window: int, geometry: Geometry, _: torch.device) -> list[Axis]:
    """Return the axes of queries of a size, whose tensors are on the default device."""
    # Callers may differentiate, also after one that did not.
    with torch.inference_mode(False):
        return _new_axes(length, window, geometry)


def _new_axes(length: int, window: int, geometry: Geometry) -> list[Axis]:
    r = window // 2
    wrapped = _wrapped(r)
    image = torch.arange(length)
    same = geometry.sources == "same"
    if geometry.padding == "inside":
        return [Axis(image, torch.arange, r, same, window)]
    if geometry.padding == "circular":
        return [Axis(wrapped(length), wrapped, 0, same, window)]
    if geometry.padding == "valid":
        return [Axis(wrapped(length), torch.arange, 0, same, window)]
    if same or length < window:
        return [Axis(_margin(-r, length + r, length), _margin_of(r, 0, None), 0, True, window)]
    interior = Axis(image, torch.arange, r, False, window)
    if r == 0:
        return [interior]
    return [
        interior,
        Axis(_margin(-r, 2 * r, length), _margin_of(r, 0, 2 * r), 0, True, window),
        Axis(
            _margin(length - 2 * r, length + r, length),
            _margin_of(r, -2 * r, None),
            length - r,
            True,
            window,
        ),
    ]


def _wrapped(r: int) -> Callable[[int], Tensor]:
    return lambda length: torch.arange(-r, length + r) % length


def _margin(start: int, stop: int, length: int) -> Tensor:
    places = torch.arange(start, stop)
    return torch.where((places >= 0) & (places < length), places, OUTSIDE)


def _margin_of(r: int, start: int, stop: int | None) -> Callable[[int], Tensor]:
    """Return the crop of any length: from r before its start, or from -start before its end."""

    def places(length: int) -> Tensor:
        first = length + start if start else -r
        return _margin(first, length + r if stop is None else stop, length)

    return places


def _factors(length: int, window: int, fold: float, geometry: Geometry) -> Tensor:
    """Return the normalised weights of one axis, [length, k].

    Entry ``[p, o]`` is that of place p in the patch centred at p - (o - r). Weights are taken
    relative to the largest that reaches the place, because e^(-1/ρ²) underflows.
    """
    r = window // 2
    offset = torch.arange(window) - r
    if geometry.padding == "inside":
        centre = torch.arange(length)[:, None] - offset
        reaches = (centre >= r) & (centre < length - r)
    elif geometry.padding == "zeros":
        centre = torch.arange(length)[:, None] - offset
        reaches = (centre >= 0) & (centre < length)
    else:
        reaches = torch.ones(length, window, dtype=torch.bool)
    distance = (offset.double() / max(r, 1)).square().expand(length, window)
    nearest = distance.masked_fill(~reaches, math.inf).amin(1, keepdim=True)
    if fold == 0:
        weights = (distance == nearest).double()
    else:
        weights = torch.exp((nearest - distance) / (2 * fold * fold))
    weights = weights * reaches
    return weights / weights.sum(1, keepdim=True)


def own_patch(image: Tensor, cell: Cell, out: Tensor) -> None:
    """Write a value of each patch [Q, P] to the place of the image [H, W] it is centred at."""
    rows, cols = cell.rows, cell.cols
    out[rows.first : rows.first + rows.places, cols.first : cols.first + cols.places] = image


def extend(image: Tensor, window: int, geometry: Geometry) -> Tensor:
    """Return [H, W] with border places set to the nearest place that a patch is centred at."""
    if geometry.padding != "inside":
        return image
    r = window // 2
    height, width = image.shape
    rows = torch.arange(height).clamp(r, height - 1 - r)
    cols = torch.arange(width).clamp(r, width - 1 - r)
    return image[rows][:, cols]


def grouped(images: Sequence[Tensor]) -> list[Tensor]:
    """Return images [C, H, W] in order, those of one size in a row stacked: [[N, C, H, W], …].

    Groups [N, C, H, W] among them, and images alone in their group, are not copied.
    """
    runs: list[int] = []
    for index, image in enumerate(images):
        fresh = index == 0 or image.ndim == 4 or image.shape != images[index - 1].shape
        runs.append(runs[-1] + fresh if runs else 0)
    return [_stacked([images[i] for i in members]) for members in group_by(runs).values()]


def _stacked(images: list[Tensor]) -> Tensor:
    if len(images) > 1:
        return torch.stack(images)
    (image,) = images
    return image if image.ndim == 4 else image[None]


def count_fold_pairs(
    geometry: Geometry, query: tuple[int, int], image: tuple[int, int], window: int
) -> int:
    """Return the number of logits of a query and one bank image [H, W] each: the unit of cost."""
    pairs = 0
    for cell in cells(*query, window, geometry):
        product = 1
        for axis, length in zip((cell.rows, cell.cols), image, strict=True):
            keys = len(axis.keys(length)) - window + 1
            product *= axis.places if axis.same else axis.places * keys
        pairs += product
    return pairs


def count_fold_work(
    geometry: Geometry, query: tuple[int, int], image: tuple[int, int], window: int, lanes: int = 8
) -> int:
    """Return the number of logits that are computed for a query and one bank image [H, W] each.

    Displacements are those of a ring of columns, a multiple of ``lanes``, so that some of its
    logits are of no pair; a running sum over rows starts ``window`` rows before its first logit.
    """
    work = 0
    for cell in cells(*query, window, geometry):
        crop = len(cell.cols.keys(image[1]))
        ring = -(-max(len(cell.cols.query), crop) // lanes) * lanes
        rows, keys = cell.rows.places, len(cell.rows.keys(image[0])) - window + 1
        started = window if cell.rows.same else (window - 1) * (rows + keys - 1)
        vertical = rows if cell.rows.same else rows * keys
        work += (vertical + started) * ring * (1 if cell.cols.same else ring)
    return work
