"""Stored images that folds are computed from: all of a bank, or the blocks that a process has."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from els_kernels.blocks import Blocks, block_size
from els_kernels.control import checkpoint
from els_kernels.native.binding import _library, kernel_index
from els_kernels.native.block_sums import centre_of
from els_kernels.native.fold_pass import FoldFrame, FoldPass, FoldRows, FoldSource, run_pass
from els_kernels.torch_fold import box_sums, centred, channel_sums

_TILE = 1 << 20
"""Numbers of bank images that are centred together."""


class FoldSourceImages(Protocol):
    """Images of a bank, in this process or in several."""

    centre: Tensor
    """[C, 1, 1] float64: mean of the whole bank."""
    largest: float
    """Largest |pixel| of the whole bank, from its centre."""
    block_size: int
    """Images of a block."""
    count: int
    """Images of the whole bank."""
    processes: int
    """Number of processes that have them."""

    @property
    def groups(self) -> Sequence[Tensor]:
        """Stored images in order, as groups of images of one size, [N, C, H, W]."""
        ...

    @property
    def spread(self) -> tuple[float, float]:
        """Mean square and largest norm of a centred pixel of the bank."""
        ...

    def largest_norm(self, frame: FoldFrame) -> float:
        """Return the largest norm of a patch of the bank, whatever the range; computed once."""
        ...

    def keys(self, frame: FoldFrame, ranges: list[tuple[int, int]]) -> int:
        """Return a bound of the number of keys of a query patch in ranges of images."""
        ...

    def ring(self, frame: FoldFrame) -> int:
        """Return the columns of a ring for any image of the bank."""
        ...

    def rows(self, each: FoldPass) -> FoldRows:
        """Return the results of a pass over the blocks of its ranges, in order.

        Raises:
            ComputationStoppedError: The current ``Control`` was stopped.
            MemoryError: The partial results do not fit in memory.
        """
        ...


class FoldImages:
    """Images of this process, as groups of images of one size.

    Pixels are decoded and centred where they are read, once for some displacements of an image: the
    bank needs no second copy.

    Args:
        groups: [N, C, H, W] on the CPU, float32, or uint8 v for v/127.5 − 1.
        instruction_set: one of ``instruction_sets()``; None for the best.
        blocks: of the process, each of which is a group, if they are not a whole bank.
        centre: of the whole bank, [C, 1, 1] float64; None to compute it from the images.

    Raises:
        ValueError: The bank is not on the CPU, or the instruction set is unknown.
        RuntimeError: The library was not built, or cannot be loaded.
    """

    processes = 1

    def __init__(
        self,
        groups: Sequence[Tensor],
        *,
        instruction_set: str | None = None,
        blocks: Blocks | None = None,
        centre: Tensor | None = None,
    ) -> None:
        self._kernel = kernel_index(groups[0].device, instruction_set)
        self._lanes = int(_library().els_kernel_lanes(self._kernel))
        self.groups = list(groups)
        if blocks is None:
            self._firsts = [0, *itertools.accumulate(map(len, groups))][:-1]
            self.count = sum(map(len, groups))
            self.block_size = block_size(self.count)
        else:
            self._firsts = [lo for lo, _ in blocks.limits]
            self.count, self.block_size = blocks.images, blocks.size
        self.centre = centre_of(self.block_sums())[:, None, None] if centre is None else centre
        self.largest = largest_of((ends_of(group) for group in groups), self.centre)
        values = every_byte(self.centre) if groups[0].dtype == torch.uint8 else None
        self._pixels = {"centre": self.centre.flatten().float().contiguous()}
        if values is not None:
            self._pixels["values"] = values
        self._norms: dict[tuple[object, ...], float] = {}

    def block_sums(self) -> list[Tensor]:
        """Return the number of pixels and the sums of the channels of each block, [1 + C]."""
        sums: dict[int, Tensor] = {}
        for block, source in self._pieces([(0, self.count)]):
            found = stored_sums(source.stored)
            sums[block] = sums[block] + found if block in sums else found
        return list(sums.values())

    @cached_property
    def spread(self) -> tuple[float, float]:
        """Mean square and largest norm of a centred pixel of the bank."""
        return spread_of(self.block_squares())

    def block_squares(self) -> Tensor:
        """Return of each block numbers, the sum of their squares, and the largest of a pixel."""
        found: dict[int, Tensor] = {}
        for block, source in self._pieces([(0, self.count)]):
            for tile in _tiles(source.stored, self.centre):
                squares = tile.double().square()
                largest = float(squares.sum(1).max())
                own = found.setdefault(block, torch.zeros(3, dtype=torch.float64))
                own += torch.tensor([tile.numel(), float(squares.sum()), 0], dtype=torch.float64)
                own[2] = max(float(own[2]), largest)
        return torch.stack(list(found.values()))

    def largest_norm(self, frame: FoldFrame) -> float:
        """Return the largest norm of a patch of these images, whatever the range; computed once."""
        cell, name = frame.shape, frame.keys_name
        if name not in self._norms:
            largest = 0.0
            for tile in itertools.chain(*(_tiles(group, self.centre) for group in self.groups)):
                squares = cell.keys(tile).double().square().sum(1)
                squares = box_sums(squares, frame.window)
                largest = max(largest, float(squares.max()))
            self._norms[name] = math.sqrt(largest)
        return self._norms[name]

    def keys(self, frame: FoldFrame, ranges: list[tuple[int, int]]) -> int:
        """Return a bound of the number of keys of a query patch in ranges of images."""
        cell = frame.shape
        counts: dict[tuple[int, int], int] = {}
        for _, source in self._pieces(ranges):
            size = source.images.shape[2], source.images.shape[3]
            counts[size] = counts.get(size, 0) + source.hi - source.lo
        return sum(
            count * len(cell.rows.keys(height)) * len(cell.cols.keys(width))
            for (height, width), count in counts.items()
        )

    def ring(self, frame: FoldFrame) -> int:
        """Return the columns of a ring for any image of the bank."""
        return frame.lines()[1].ring([group.shape[3] for group in self.groups], self._lanes)

    def rows(self, each: FoldPass) -> FoldRows:
        """Return the results of a pass over the blocks of its ranges; see ``FoldSourceImages``."""
        blocks: dict[int, list[FoldSource]] = {}
        for block, source in self._pieces(each.ranges):
            blocks.setdefault(block, []).append(source)
        return run_pass(self._kernel, self._lanes, list(blocks.values()), self._pixels, each)

    def _pieces(self, ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, FoldSource]]:
        """Yield the parts of the groups in ranges, none across blocks, with their blocks."""
        for lo, hi in ranges:
            for first, group in zip(self._firsts, self.groups, strict=True):
                start, stop = max(lo, first), min(hi, first + len(group))
                while start < stop:
                    block = start // self.block_size
                    end = min(stop, (block + 1) * self.block_size)
                    yield block, FoldSource(group, first, start, end)
                    start = end


def stored_sums(images: Tensor) -> Tensor:
    """Return the number of pixels and the sums of the channels of stored images, [1 + C]."""
    pixels = torch.tensor([images.numel() / images.shape[1]], dtype=torch.float64)
    return torch.cat([pixels, channel_sums(images)])


def ends_of(group: Tensor) -> Tensor:
    """Return the least and the largest stored number of each channel, [2, C]."""
    return torch.stack([group.amin((0, 2, 3)), group.amax((0, 2, 3))])


def largest_of(ends: Iterable[Tensor], centre: Tensor) -> float:
    """Return the largest |pixel| from the centre [C, 1, 1], of the ends of groups."""
    return max(float(centred(each[..., None, None], centre).abs().max()) for each in ends)


def spread_of(squares: Tensor) -> tuple[float, float]:
    """Return ``FoldSourceImages.spread`` of ``block_squares`` [K, 3] of a bank in order."""
    count, total = 0.0, 0.0
    for numbers, sums, _ in squares.tolist():
        count, total = count + numbers, total + sums
    return total / count, math.sqrt(float(squares[:, 2].max()))


def every_byte(centre: Tensor) -> Tensor:
    """Return the pixel of each byte, less the centre [C, 1, 1], as [C, 256] float32."""
    every = torch.arange(256, dtype=torch.uint8).expand(1, len(centre), 1, 256)
    return centred(every, centre)[0, :, 0].contiguous()


def _tiles(group: Tensor, centre: Tensor) -> Iterator[Tensor]:
    """Yield the centred images of a group, [n, C, H, W] float32, a few at a time."""
    together = max(1, _TILE // group[0].numel())
    for first in range(0, len(group), together):
        checkpoint()
        yield centred(group[first : first + together], centre)
