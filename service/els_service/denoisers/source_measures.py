"""Measures of the sources of an image's pixels: regions copied as a whole, seams between them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

CONCENTRATION = 0.9
"""Share of all sources that ``sources_of_90`` counts images for."""
_EQUAL = 0.5
"""Least weight of a source that counts as much as the largest, as a part of it."""
_CLEAR = 0.5
"""Least weight of the counted sources of a clear pixel together."""

Mask = npt.NDArray[np.bool_]
_Pairs: TypeAlias = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


@dataclass(frozen=True, eq=False)
class Sources:
    """Sources of each pixel that count: those of at least half the largest weight.

    Attributes:
        images: int64 [H, W, m], bank image; −1 where there are fewer; m is the most of any pixel.
        rows: int64 [H, W, m], displacement of the source from the pixel; with ``wraps`` the
            remainder by the height of the bank image.
        columns: int64 [H, W, m], the same by columns.
        clear: [H, W], whether these weigh at least a half together. Flat regions are not clear, as
            a large number of bank patches equals them.
    """

    images: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int64]
    clear: Mask

    @cached_property
    def pixels(self) -> npt.NDArray[np.int64]:
        """Pixel of each counted source, row by row, [K]; rises."""
        pixels: npt.NDArray[np.int64] = np.flatnonzero(self.images >= 0) // self.images.shape[2]
        return pixels

    @cached_property
    def continued(self) -> tuple[_Pairs, _Pairs]:
        """Counted sources, and those of the pixel below that continue them; then on the right.

        Numbers of ``pixels``: the same bank image at the same displacement.
        """
        height, width, _ = self.images.shape
        numbers = _numbered(self)
        _, place = np.unique(numbers[numbers >= 0], return_inverse=True)
        kinds = int(place.max(initial=0)) + 1
        codes = self.pixels * kinds + place
        order = np.argsort(codes)
        row, column = np.divmod(self.pixels, width)
        return (
            _continuing(codes, order, width * kinds, row < height - 1),
            _continuing(codes, order, kinds, column < width - 1),
        )


def sources_of(
    sources: npt.NDArray[np.int64],
    weights: npt.NDArray[np.float32],
    *,
    wraps: bool,
    extents: npt.NDArray[np.int64] | None = None,
) -> Sources:
    """Return the sources that count.

    Args:
        sources: [H, W, m, 3].
        weights: [H, W, m], falling.
        wraps: whether bank images continue at the opposite border.
        extents: [N, 2], height and width of each bank image; None for those of the image.
    """
    height, width = weights.shape[:2]
    counted = (weights >= _EQUAL * weights[..., :1]) & (sources[..., 0] >= 0)
    clear = np.where(counted, weights, 0).sum(-1) >= _CLEAR
    # Weights fall: those that count come first, and most images have few.
    most = max(1, int(counted.any((0, 1)).sum()))
    counted, sources = counted[..., :most], sources[:, :, :most]
    rows = sources[..., 1] - np.arange(height)[:, None, None]
    columns = sources[..., 2] - np.arange(width)[None, :, None]
    if wraps:
        # Where there are fewer sources the image is −1, and does not count.
        sides = np.array([height, width]) if extents is None else extents[sources[..., 0]]
        rows, columns = rows % sides[..., 0], columns % sides[..., 1]
    return Sources(np.where(counted, sources[..., 0], -1), rows, columns, clear)


def agreeing(found: Sources, row: int, column: int, image: int | None = None) -> Mask:
    """Return the pixels [H, W] with a source at a displacement, in one bank image or any."""
    counted = found.images >= 0 if image is None else found.images == image
    mask: Mask = (counted & (found.rows == row) & (found.columns == column)).any(-1)
    return mask


def seams(found: Sources) -> float | None:
    """Return the share of neighbouring clear pixels whose sources do not agree.

    Two pixels agree if a source of one continues a source of the other: the same bank image at the
    same displacement. Neighbours share a side. None if no two neighbours are clear.
    """
    pairs, broken = 0, 0
    for axis, (first, _) in enumerate(found.continued):
        before, after = _neighbours(found.clear, axis)
        agree = np.zeros(found.clear.shape, np.bool_)
        agree.reshape(-1)[found.pixels[first]] = True
        both = before & after
        pairs += int(both.sum())
        broken += int((both & ~_neighbours(agree, axis)[0]).sum())
    return broken / pairs if pairs else None


def largest_region(found: Sources) -> float:
    """Return the share of the pixels in the largest connected region of one displacement.

    All its pixels have a source in the same bank image at the same displacement.
    """
    first, second = (np.concatenate(one) for one in zip(*found.continued, strict=True))
    parts = _components(len(found.pixels), first, second)
    return int(np.bincount(parts).max(initial=0)) / found.clear.size


def _components(
    count: int, first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Return the smallest number connected to each of ``count`` by the edges first – second."""
    parents = np.arange(count)
    while True:
        one, other = parents[first], parents[second]
        if np.array_equal(one, other):
            return parents
        lower = np.minimum(one, other)
        np.minimum.at(parents, one, lower)
        np.minimum.at(parents, other, lower)
        while not np.array_equal(shorter := parents[parents], parents):
            parents = shorter


def _continuing(
    codes: npt.NDArray[np.int64], order: npt.NDArray[np.int64], step: int, inside: Mask
) -> _Pairs:
    """Return the sources whose code is another's and ``step``, and that other, in pairs.

    Args:
        codes: of each source, [K], all different.
        order: that sorts them.
        step: from the code of a source to the one that continues it.
        inside: which sources have a neighbour at all.
    """
    wanted = codes + step
    at = np.searchsorted(codes, wanted, sorter=order)
    found = order[np.minimum(at, len(order) - 1)] if len(order) else order
    first = np.flatnonzero(inside & (codes[found] == wanted))
    return first, found[first]


def _numbered(found: Sources) -> npt.NDArray[np.int64]:
    """Return one number for each bank image at each displacement, [H, W, m]; −1 for none."""
    numbers = found.images
    for places in (found.rows, found.columns):
        least = int(places.min())
        numbers = numbers * (int(places.max()) - least + 1) + (places - least)
    return np.where(found.images >= 0, numbers, -1)


def _neighbours(array: Mask, axis: int) -> tuple[Mask, Mask]:
    """Return the views of all pixels with a neighbour below or on the right, and of these."""
    if axis == 0:
        return array[:-1], array[1:]
    return array[:, :-1], array[:, 1:]
