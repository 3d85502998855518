"""Bank of a native fold: stored images, and the units in which its logits are integers.

Logits are integers in units of 2^-bits, modulo 2^32: as fine as keeps the difference of any two
logits of a patch below 2^31. Box sums of integers are exact, whatever the size of a logit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from els_kernels.control import checkpoint
from els_kernels.fold_plan import Cell, FoldQuery
from els_kernels.native.binding import _library, kernel_index
from els_kernels.native.far_queries import MOST_ERROR, is_far
from els_kernels.torch_fold import bank_centre, box_sums, centred

_LOG2E = math.log2(math.e)
_MOST_BITS = 20.0
_SPARE = 100.0
"""Bits of a logit for the headroom of running maxima, and for rounding."""
_TILE = 1 << 20
"""Numbers of bank images that are centred together."""


class FoldPixels(NamedTuple):
    """How stored pixels are read: less the centre of the bank."""

    centre: Tensor
    """[C] float32."""
    values: Tensor | None
    """[C, 256] float32: pixel of each byte, less the centre; None for a bank in float32."""

    @classmethod
    def of(cls, centre: Tensor, dtype: torch.dtype) -> FoldPixels:
        """Return those of a bank with a centre [C, 1, 1] float64."""
        values = None
        if dtype == torch.uint8:
            every = torch.arange(256, dtype=torch.uint8).expand(1, len(centre), 1, 256)
            values = centred(every, centre)[0, :, 0].contiguous()
        return cls(centre.flatten().float().contiguous(), values)


class FoldUnits(NamedTuple):
    """How logits of a cell are written as integers."""

    bits: float
    """log₂ of the units of a bit."""
    product: float
    """Units of a product of centred pixels of query and key."""
    bias: float
    """Units of a key's squared norm."""
    lowest: float
    """Units below every logit."""
    error: float
    """Bits that a logit may be wrong by."""


class FoldCrop(NamedTuple):
    """One cell of a query."""

    cell: Cell
    pixels: Tensor
    """[C, X, Y] float64, relative to a times the centre of the bank."""
    squares: Tensor
    """Squared norm of each patch, [Q, P]."""
    units: FoldUnits
    resolved: bool
    """Whether integers resolve the logits; if not, the query is far: see ``far_queries``."""


class NativeFoldBank:
    """A bank as it is stored, as groups of images of one size.

    Pixels are decoded and centred where they are read, once for some displacements of an image: the
    bank needs no second copy.
    """

    def __init__(self, groups: Sequence[Tensor], *, instruction_set: str | None = None) -> None:
        """Prepare a bank.

        Args:
            groups: [N, C, H, W] on the CPU, of one size each, float32, or uint8 v for v/127.5 − 1.
            instruction_set: one of ``instruction_sets()``; None for the best.

        Raises:
            ValueError: The bank is not on the CPU, or the instruction set is unknown.
            RuntimeError: The library was not built, or cannot be loaded.
        """
        self.kernel = kernel_index(groups[0].device, instruction_set)
        """Index of the instruction set in the library."""
        self.lanes = int(_library().els_kernel_lanes(self.kernel))
        """Numbers of a vector."""
        self.groups = list(groups)
        self.centre = bank_centre(groups)
        self._norms: dict[tuple[object, ...], float] = {}
        self._largest = max(_largest(group, self.centre) for group in groups)

    @cached_property
    def pixels(self) -> FoldPixels:
        """How its pixels are read."""
        return FoldPixels.of(self.centre, self.groups[0].dtype)

    def crop_of(self, query: FoldQuery, cell: Cell, name: tuple[object, ...]) -> FoldCrop:
        """Return a crop of a query.

        Args:
            query: one image.
            cell: of the query.
            name: of the cell, whatever the query: the largest norm of its keys is kept.
        """
        a, s = query.a, query.s
        image = query.x.double() - a * self.centre
        crop = cell.query(image)
        squares = box_sums(crop.square().sum(0), query.window)
        norms = math.sqrt(float(squares.max())), self._largest_norm(cell, name)
        units = fold_units(*norms, query.window**2, a, s)
        far = is_far(float(image.abs().amax()), self._largest, a, s)
        resolved = not far or units.error * math.log(2) <= MOST_ERROR
        return FoldCrop(cell, crop, squares, units, resolved)

    def tiles(self) -> Iterator[Tensor]:
        """Yield the centred images of the bank, [n, C, H, W] float32, a few at a time."""
        for group in self.groups:
            together = max(1, _TILE // group[0].numel())
            for first in range(0, len(group), together):
                checkpoint()
                yield centred(group[first : first + together], self.centre)

    def _largest_norm(self, cell: Cell, name: tuple[object, ...]) -> float:
        """Return the largest norm of a patch of the bank, whatever the range; computed once."""
        if name not in self._norms:
            squares = (cell.keys(images).double().square().sum(1) for images in self.tiles())
            largest = max(float(box_sums(each, cell.rows.window).max()) for each in squares)
            self._norms[name] = math.sqrt(largest)
        return self._norms[name]


def _largest(group: Tensor, centre: Tensor) -> float:
    """Return the largest |pixel| of stored images [N, C, H, W], from the centre of the bank."""
    ends = torch.stack([group.amin((0, 2, 3)), group.amax((0, 2, 3))])
    return float(centred(ends[..., None, None], centre).abs().max())


def fold_units(query: float, key: float, pixels: int, a: float, s: float) -> FoldUnits:
    """Return the units in which logits of patches of these norms fit 31 bits.

    Args:
        query: largest norm of a centred patch of the query.
        key: largest norm of a centred patch of the bank.
        pixels: of a patch.
        a: signal scale.
        s: noise scale.
    """
    per_product = a / s / s * _LOG2E
    per_norm = -(a / s) * (a / s) * _LOG2E / 2
    # A logit is a product of at most 2qk bits minus k², for keys of any norm up to k.
    root = math.sqrt(_LOG2E / 2)
    q, k = query / s * root, a / s * key * root
    highest = q * q if q < k else 2 * q * k - k * k
    spread = highest + 2 * q * k + k * k + _SPARE
    bits = min(_MOST_BITS, 31 - math.log2(spread))
    lowest = per_norm * key * key - per_product * query * key
    unit = math.exp2(bits)
    # Products and norm are rounded to units, products to floats before.
    rounding = pixels / 2 + 1 - 2.0**-24 * lowest * unit
    return FoldUnits(
        bits,
        per_product * unit,
        per_norm * unit,
        math.floor(lowest * unit) - 1.0,
        rounding / unit,
    )
