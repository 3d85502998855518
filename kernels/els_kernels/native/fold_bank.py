"""Bank of a native fold: the units in which its logits are integers, and passes over its blocks.

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

from els_kernels.blocked_moments import in_order
from els_kernels.fold_plan import Cell, FoldQuery
from els_kernels.native.far_queries import MOST_ERROR, is_far
from els_kernels.native.fold_images import FoldImages, FoldSourceImages
from els_kernels.native.fold_pass import (
    NORMALISE,
    STATISTICS,
    TOTALS,
    FoldFrame,
    FoldPass,
    FoldRows,
    merge_lists,
    merge_normalisers,
)
from els_kernels.torch_fold import box_sums

_LOG2E = math.log2(math.e)
_MOST_BITS = 20.0
_SPARE = 100.0
"""Bits of a logit for the headroom of running maxima, and for rounding."""
_BYTES = 24 << 20
"""Of the partial results of a pass."""
_MOST_ALONE, _MOST_TASKS, _LEAST_TASKS = 32, 8, 4
"""Most tasks of the only block of a range, most of each of several, and least of any."""


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
    """A bank whose folds are computed by the native kernel.

    Args:
        bank: groups of images, [N, C, H, W] on the CPU, of one size each, float32, or uint8 v for
            v/127.5 − 1; or images, of this process or of several.
        instruction_set: of groups: one of ``instruction_sets()``; None for the best.

    Raises:
        ValueError: The bank is not on the CPU, or the instruction set is unknown.
        RuntimeError: The library was not built, or cannot be loaded.
    """

    def __init__(
        self, bank: Sequence[Tensor] | FoldSourceImages, *, instruction_set: str | None = None
    ) -> None:
        if isinstance(bank, Sequence):
            bank = FoldImages(bank, instruction_set=instruction_set)
        self.images = bank

    @property
    def groups(self) -> Sequence[Tensor]:
        """Stored images, for computations in float64."""
        return self.images.groups

    def crop_of(self, query: FoldQuery, cell: Cell, name: FoldFrame) -> FoldCrop:
        """Return a crop of a query.

        Args:
            query: one image.
            cell: of the query.
            name: of the cell, whatever the query: the largest norm of its keys is kept.
        """
        a, s = query.a, query.s
        image = query.x.double() - a * self.images.centre
        crop = cell.query(image)
        squares = box_sums(crop.square().sum(0), query.window)
        norms = math.sqrt(float(squares.max())), self.images.largest_norm(name)
        units = fold_units(*norms, query.window**2, a, s)
        far = is_far(float(image.abs().amax()), self.images.largest, a, s)
        resolved = not far or units.error * math.log(2) <= MOST_ERROR
        return FoldCrop(cell, crop, squares, units, resolved)


class FoldPasses:
    """Passes over ranges of a bank for one query crop, block by block.

    Sums of blocks are merged in the order of the bank, so that they have the same bits however many
    processes have the blocks.

    Args:
        images: of the bank.
        frame: of the query.
        crop: [C, X, Y] float64, centred.
        units: of its logits.
        ranges: of bank images.
        precision: weights that do not count are together 2^-precision of a patch's normaliser at
            most.
    """

    def __init__(
        self,
        images: FoldSourceImages,
        frame: FoldFrame,
        crop: Tensor,
        units: FoldUnits,
        ranges: list[tuple[int, int]],
        precision: int,
    ) -> None:
        self._images, self._frame = images, frame
        dead = precision + math.log2(images.keys(frame, ranges))
        self._logits = units.bias, math.exp2(-units.bits), units.lowest, dead
        self._query = (crop * units.product).float().contiguous()
        size = images.block_size
        self._blocks: dict[int, list[tuple[int, int]]] = {}
        for lo, hi in ranges:
            for block in range(lo // size, -(-hi // size)):
                part = max(lo, block * size), min(hi, (block + 1) * size)
                self._blocks.setdefault(block, []).append(part)

    def normalisers(self, classes: dict[str, Tensor] | None = None) -> tuple[Tensor, ...]:
        """Return the normaliser of each patch: whole part int32, rest, and log₂ in bits, [Q, P].

        Args:
            classes: of patches, where they differ from those of the frame.
        """
        found = list(self._passes(NORMALISE, 12 * self._patches, classes or {}, {}))
        peaks, totals = (torch.cat(each) for each in zip(*(one[:2] for one in found), strict=True))
        return merge_normalisers(peaks, totals, self._logits)

    def run(
        self,
        kind: int,
        tensors: dict[str, Tensor],
        numbers: dict[str, int],
        *,
        answered: bool = True,
    ) -> FoldRows:
        """Return the results of another pass over all blocks, in one row.

        Args:
            kind: of pass.
            tensors: inputs of ``ElsFoldCall``.
            numbers: its other fields.
            answered: whether sums of pixels are wanted, and not those of patches alone.

        Raises:
            ComputationStoppedError: The current ``Control`` was stopped.
            MemoryError: The partial results do not fit in memory.
        """
        channels, rows, _ = self._query.shape
        planes = {STATISTICS: 2 + 2 * channels, TOTALS: 1 + channels}.get(kind, channels)
        numbers_of_task = planes * rows * self._ring + 2 * self._patches
        found = list(self._passes(kind, 8 * numbers_of_task, tensors, numbers, answered))
        weights, codes, origins = merge_lists(found, numbers.get("top", 0))
        first = found[0]
        return first._replace(
            planes=in_order([row for one in found for row in one.planes]),
            scalars=in_order([row for one in found for row in one.scalars] or [first.scalars]),
            shares=torch.cat([one.shares for one in found]),
            weights=weights,
            codes=codes,
            origins=origins,
        )

    @cached_property
    def _ring(self) -> int:
        return self._images.ring(self._frame)

    @property
    def _patches(self) -> int:
        """Numbers of the patches of a row of the kernel, all rows."""
        return int((self._query.shape[1] - self._frame.window + 1) * self._ring)

    def _passes(
        self,
        kind: int,
        task_bytes: int,
        tensors: dict[str, Tensor],
        numbers: dict[str, int],
        answered: bool = True,
    ) -> Iterator[FoldRows]:
        """Yield the results of blocks, as many at a time as memory allows."""
        blocks = list(self._blocks.values())
        most = _MOST_ALONE if len(blocks) == 1 else _MOST_TASKS
        parts = max(_LEAST_TASKS, min(most, _BYTES // task_bytes))
        # Results do not depend on how many blocks are computed together.
        together = max(1, _BYTES // (parts * task_bytes)) * self._images.processes
        for first in range(0, len(blocks), together):
            ranges = [part for block in blocks[first : first + together] for part in block]
            given = {"query": self._query} | tensors
            yield self._images.rows(
                FoldPass(kind, self._frame, ranges, parts, self._logits, given, numbers, answered)
            )


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
