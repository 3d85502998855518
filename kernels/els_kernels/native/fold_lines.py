"""Axes of a query on which every pair of a pixel and a source is met once, for moments of a fold.

The cells of ``fold_plan`` split patches by border, and wrap around a torus in two pieces, so that a
pixel meets a source as often as patches of different cells join them: enough for a mean, but not
for what is not linear in the weights. Here an axis is one line. With r = k // 2::

    inside      the image
    zeros       r zeros on either side; a patch attends to those that are clipped alike
    circular    2r places more on either side, so that all patches of a pixel are around it; the
                line of the bank is periodic, and a displacement runs from 0 to its length
    valid       the query as circular, the bank's image as it is

Along an axis of the *same* place there is one displacement, and query and bank have one line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from els_kernels.fold_plan import OUTSIDE, Axis, Cell
from els_kernels.geometry import Geometry

_NO_PATCH = -2
"""Class of a key that is no patch; -1 is that of a query patch that attends to none."""


@dataclass(frozen=True)
class KeyLine:
    """A line of the bank along one axis."""

    places: Tensor
    """int32 [T]: the place of the image, -1 for zeros."""
    classes: Tensor
    """int32 [T - k + 1]: a query patch attends to patches of its class."""
    displacements: tuple[int, int]
    """Range of displacements between a query patch and its keys."""


@dataclass(frozen=True)
class Line:
    """One axis of a query, or the part of it that answers some of its places."""

    axis: Axis
    """Its crop and its patches; ``keys`` has every patch of a bank image once."""
    length: int
    """Of the image."""
    first: int
    """Place of the crop at which the answered places start."""
    geometry: Geometry
    answered: slice
    """Places of the image."""
    of_cell: bool = False
    """Whether it is an axis of a cell, in which every patch attends to every other."""

    @property
    def size(self) -> int:
        """Length of the crop."""
        return len(self.axis.query)

    @property
    def image(self) -> slice:
        """The answered places of the crop."""
        return slice(self.first, self.first + self.answered.stop - self.answered.start)

    def part(self, places: slice) -> Line:
        """Return the line of the patches that reach some places of the image alone.

        Of the whole line, whose crop has all patches of a place around it.
        """
        k, first = self.axis.window, self.first + places.start
        start = max(0, first - k + 1)
        stop = min(self.axis.places, self.first + places.stop)
        axis = self.axis.part(start, stop)
        return Line(axis, self.length, first - start, self.geometry, places)

    def own(self) -> Tensor:
        """Return the patch that has the normaliser of each patch: itself, or what it repeats."""
        patch = torch.arange(self.axis.places)
        whole = self.answered == slice(0, self.length)
        if self.of_cell or not whole or self.geometry.padding not in ("circular", "valid"):
            return patch
        repeats = self.axis.places - self.length
        return (patch - repeats // 2) % self.length + repeats // 2

    def classes(self) -> Tensor:
        """Return the classes of the patches of the query, int32 [P]."""
        offset = self.axis.offset
        # With zeros there are as many patches as places.
        whole = self._classes(max(self.length, offset + self.axis.places))
        return whole[offset : offset + self.axis.places].contiguous()

    def key_line(self, length: int) -> KeyLine:
        """Return the line of a bank image of a length, without a ring."""
        k, places = self.axis.window, self.axis.places
        if self._periodic:
            line = torch.arange(self.size + length - 1) - self.first + self.answered.start
            classes = torch.zeros(len(line) - k + 1, dtype=torch.int32)
            return KeyLine((line % length).int(), classes, (0, length))
        line = self.axis.keys(length).int()
        classes = self._classes(len(line) - k + 1)
        here = self.axis.offset
        return KeyLine(
            line, classes, (here, here + 1) if self.axis.same else (1 - places, len(classes))
        )

    def ring(self, lengths: list[int], lanes: int) -> int:
        """Return the columns of a ring for bank images of some lengths: whole vectors."""
        longest = 0 if self._periodic else max(len(self.axis.keys(length)) for length in lengths)
        return -(-max(self.size, longest) // lanes) * lanes

    def key_ring(self, length: int, ring: int) -> KeyLine:
        """Return the line of a bank image whose displacements move it along a ring."""
        k = self.axis.window
        shifts = 1 if self.axis.same else length if self._periodic else ring
        place = torch.arange(ring + shifts)
        if self._periodic:
            classes = torch.zeros(len(place) - k + 1, dtype=torch.int32)
            places = (place - self.first + self.answered.start) % length
            return KeyLine(places.int(), classes, (0, shifts))
        line = self.key_line(length)
        places = _repeated(line.places, place % ring, OUTSIDE)
        classes = _repeated(line.classes, place[: len(place) - k + 1] % ring, _NO_PATCH)
        return KeyLine(places, classes, (0, shifts))

    @property
    def _periodic(self) -> bool:
        return self.geometry.padding == "circular" and not (self.axis.same or self.of_cell)

    def _classes(self, patches: int) -> Tensor:
        if self.geometry.padding != "zeros" or self.axis.same or self.of_cell:
            return torch.zeros(patches, dtype=torch.int32)
        r = self.axis.window // 2
        place = torch.arange(patches)
        before, after = place.clamp(max=r), (patches - 1 - place).clamp(max=r)
        return (before * (r + 1) + after).int()


def line(length: int, window: int, geometry: Geometry) -> Line:
    """Return the line of an axis of a query image."""
    r = window // 2
    same = geometry.sources == "same"
    keys: Callable[[int], Tensor] = torch.arange
    if geometry.padding == "inside":
        axis, first = Axis(torch.arange(length), keys, r, same, window), 0
    elif geometry.padding == "zeros":
        padded = _padded(r)
        axis, first = Axis(padded(length), padded, 0, same, window), r
    else:
        query = _wrapped(2 * r)
        if geometry.padding == "circular":
            keys = query if same else _wrapped(r)
        axis, first = Axis(query(length), keys, -r, same, window), 2 * r
    return Line(axis, length, first, geometry, slice(0, length))


def cell_line(axis: Axis, geometry: Geometry) -> Line:
    """Return the line of an axis of a cell, all of whose places are answered."""
    size = len(axis.query)
    return Line(axis, size, 0, geometry, slice(0, size), of_cell=True)


def plane(height: int, width: int, window: int, geometry: Geometry) -> tuple[Line, Line, Cell]:
    """Return the lines of rows and columns of a query, and the cell that they make."""
    rows, cols = line(height, window, geometry), line(width, window, geometry)
    return rows, cols, Cell(rows.axis, cols.axis)


def _wrapped(more: int) -> Callable[[int], Tensor]:
    return lambda length: torch.arange(-more, length + more) % length


def _padded(more: int) -> Callable[[int], Tensor]:
    def places(length: int) -> Tensor:
        place = torch.arange(-more, length + more)
        return torch.where((place >= 0) & (place < length), place, OUTSIDE)

    return places


def _repeated(values: Tensor, at: Tensor, missing: int) -> Tensor:
    """Return values at places; ``missing`` past their end."""
    found = values[at.clamp(max=len(values) - 1)]
    return torch.where(at < len(values), found, torch.full_like(found, missing)).contiguous()
