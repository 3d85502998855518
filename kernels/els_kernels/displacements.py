"""Pairs of query places and sources, by displacement: the sweep behind posterior moments.

Fix a displacement δ = y − u. The logits of all places u are then a box sum of one image,
``‖z[q] − φ[q+δ]‖²``, and so are the inner products of a Jacobian with a direction; its adjoint is
the transposed box sum. So one sweep serves every window, and every padding is a set of ranges:

- same place: δ = 0;
- torus: every δ, bank images wrapped around;
- boundary-broken: δ ≠ 0 joins interior places, δ = 0 every place with itself under clipped windows;
- valid: every δ that leads to an interior place, the query wrapped around.

Everything is float64, with bank images along the last axis. Tiles depend on the sizes of image,
window and range, not on the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from els_kernels.control import checkpoint
from els_kernels.geometry import Geometry, band

_TILE = 1 << 18
"""Numbers of one tile of padded bank images: 2 MiB."""


@dataclass(frozen=True, eq=False)
class Step:
    """Displacement along one axis, with the places that it joins."""

    displacement: int
    places: slice
    """Query places u."""
    query: slice
    """Pixels of the padded query that their windows cover."""
    keys: slice
    """Pixels of the padded bank that the windows of their sources cover."""
    values: slice
    """Sources y, as places of the padded bank."""
    band: Tensor
    """0/1 matrix [places, pixels] that sums each window, float64."""


@lru_cache(64)
def axis_steps(length: int, window: int, geometry: Geometry) -> tuple[Step, ...]:
    """Return the displacements along an axis; together they cover every source once."""
    r = window // 2
    everywhere = slice(0, length)
    if geometry.sources == "same":
        box = band(length, window, geometry.padding)
        return (Step(0, everywhere, everywhere, everywhere, everywhere, box),)
    if geometry.padding == "circular":
        box = band(length, window, "circular")
        return tuple(
            Step(d, everywhere, everywhere, moved, moved, box)
            for d in range(length)
            for moved in [slice(d, d + length)]
        )
    steps = []
    if geometry.padding == "zeros":
        box = band(length, window, "zeros")
        steps.append(Step(0, everywhere, everywhere, everywhere, everywhere, box))
    reach = length - 1 - r
    for d in range(-reach, reach + 1):
        if geometry.padding == "zeros":
            # Both ends interior, so that no window is clipped.
            lo, hi, margin = max(r, r - d), min(length - r, length - r - d), 0
        else:
            # The query is padded by r on both sides.
            lo, hi, margin = max(0, r - d), min(length, length - r - d), r
        if lo < hi and (d or geometry.padding != "zeros"):
            covered = slice(lo - r + margin, hi + r + margin)
            steps.append(
                Step(
                    d,
                    slice(lo, hi),
                    covered,
                    slice(lo - r + d, hi + r + d),
                    slice(lo + d, hi + d),
                    torch.ones(hi - lo, hi - lo + 2 * r, dtype=torch.float64, device="cpu")
                    .triu()
                    .tril(2 * r),
                )
            )
    return tuple(steps)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of one displacement with one tile of T bank images."""

    row: Step
    col: Step
    first: int
    """Index of the tile's first image within the range."""
    logits: Tensor
    """[R, S, T]: of the places ``row.places`` × ``col.places``."""
    keys: Tensor
    """[C, Q, P, T]: pixels of the bank that face the pixels ``row.query`` × ``col.query``."""
    values: Tensor
    """[C, R, S, T]: responses."""

    def at(self, places: Tensor) -> Tensor:
        """Return the view [..., R, S] of a tensor [..., H, W] at the query places."""
        return places[..., self.row.places, self.col.places]

    def facing(self, query: Tensor) -> Tensor:
        """Return the view [C, Q, P] of a padded image [C, H', W'] that the keys face."""
        return query[..., self.row.query, self.col.query]

    def window_sums(self, pixels: Tensor) -> Tensor:
        """Return the sums [R, S, T] over each place's window of pixels [Q, P, T]."""
        return _box(self.row.band.to(pixels), self.col.band.to(pixels), pixels)

    def spread(self, places: Tensor) -> Tensor:
        """Return the adjoint of ``window_sums``: [R, S, T] → [Q, P, T]."""
        return _box(self.row.band.T.to(places), self.col.band.T.to(places), places)


def _box(rows: Tensor, cols: Tensor, pixels: Tensor) -> Tensor:
    height, width, images = pixels.shape
    summed = (rows @ pixels.reshape(height, width * images)).view(-1, width, images)
    return cols @ summed


class Sweep:
    """Pairs of one query image with a range of bank images.

    Args:
        image: z = x/a, [C, H, W] float64.
        sigma: s/a.
        bank: [N, C, H, W], float32, or uint8 v for v/127.5 − 1; its range alone.
        window: odd side of the window.
        geometry: not whole.
    """

    def __init__(
        self, image: Tensor, sigma: float, bank: Tensor, window: int, geometry: Geometry
    ) -> None:
        self._bank = bank
        height, width = image.shape[1:]
        self.rows = axis_steps(height, window, geometry)
        self.cols = axis_steps(width, window, geometry)
        every = geometry.sources == "every"
        self._margin = window // 2 if every and geometry.padding == "valid" else 0
        self._wraps = every and geometry.padding == "circular"
        self._query = self.padded(image)[..., None]
        channels = len(image)
        self._together = _together((channels, height, width), geometry)
        self._scale = -0.5 / (sigma * sigma)

    def padded(self, image: Tensor) -> Tensor:
        """Return an image [C, H, W] padded as the query is, [C, H', W']."""
        r = self._margin
        if not r:
            return image
        height, width = image.shape[1:]
        rows = torch.arange(-r, height + r, device=image.device) % height
        cols = torch.arange(-r, width + r, device=image.device) % width
        return image[:, rows][:, :, cols]

    def unpadded(self, padded: Tensor) -> Tensor:
        """Return the adjoint of ``padded``: every copy of a pixel is added to it."""
        r = self._margin
        if not r:
            return padded
        height, width = padded.shape[1] - 2 * r, padded.shape[2] - 2 * r
        rows = torch.arange(-r, height + r, device=padded.device) % height
        cols = torch.arange(-r, width + r, device=padded.device) % width
        out = padded.new_zeros(len(padded), height, padded.shape[2]).index_add_(1, rows, padded)
        return out.new_zeros(len(out), height, width).index_add_(2, cols, out)

    def __iter__(self) -> Iterator[Pairs]:
        """Yield every pair once, tile by tile, displacement by displacement."""
        for first, tile in self._tiles():
            for row in self.rows:
                checkpoint()
                for col in self.cols:
                    keys = tile[:, row.keys, col.keys]
                    gaps = self._query[:, row.query, col.query] - keys
                    # In place, and no sum over a single channel.
                    distances = gaps.square_()[0] if len(gaps) == 1 else gaps.square_().sum(0)
                    logits = _box(row.band.to(tile), col.band.to(tile), distances)
                    values = tile[:, row.values, col.values]
                    yield Pairs(row, col, first, logits.mul_(self._scale), keys, values)

    def _tiles(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the first image of each tile, and the tile, [C, H', W', T] float64."""
        together = self._together
        for first in range(0, len(self._bank), together):
            tile = decode(self._bank[first : first + together]).permute(1, 2, 3, 0)
            if self._wraps:
                tile = torch.cat([tile, tile[:, :-1]], 1)
                tile = torch.cat([tile, tile[:, :, :-1]], 2)
            yield first, tile.contiguous()


def sweep_steps(images: int, shape: tuple[int, int, int], window: int, geometry: Geometry) -> int:
    """Return the number of ``Pairs`` of a sweep over bank images of a shape (C, H, W)."""
    _, height, width = shape
    joined = len(axis_steps(height, window, geometry)) * len(axis_steps(width, window, geometry))
    return joined * math.ceil(images / _together(shape, geometry))


def _together(shape: tuple[int, int, int], geometry: Geometry) -> int:
    """Return the bank images of one tile."""
    channels, height, width = shape
    if geometry.sources == "every" and geometry.padding == "circular":
        height, width = 2 * height - 1, 2 * width - 1
    return max(1, _TILE // (channels * height * width))


def decode(images: Tensor) -> Tensor:
    """Return images as float64; uint8 v means v/127.5 − 1, rounded to float32 as banks are."""
    if images.dtype == torch.uint8:
        return images.float().div_(127.5).sub_(1).double()
    return images.double()
