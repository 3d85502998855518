"""Folds of a bank whose blocks are in several processes: the bits of one, merged here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from els_kernels.blocks import Blocks
from els_kernels.native.binding import _library, kernel_index
from els_kernels.native.block_sums import centre_of
from els_kernels.native.fold_images import largest_of, spread_of
from els_kernels.native.fold_pass import STATISTICS, FoldFrame, FoldPass, FoldRows, merge_lists
from els_kernels.native.parted import in_turn


class FoldParts(Protocol):
    """Processes that have the blocks of a bank between them: the i-th every n-th from i on.

    Each method returns the answers of all, in order.
    """

    @property
    def blocks(self) -> list[Blocks]:
        """Blocks of each process."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        ...

    def fold_images(self) -> Sequence[Tensor]:
        """Return the stored images of the whole bank, mapped, for computations in float64."""
        ...

    def fold_sums(self) -> list[tuple[Tensor, Tensor]]:
        """Return ``FoldImages.block_sums`` [K, 1 + C], and the ends [2, C] of its groups."""
        ...

    def fold_squares(self, centre: Tensor) -> list[Tensor]:
        """Return ``FoldImages.block_squares``."""
        ...

    def fold_norms(self, centre: Tensor, frame: FoldFrame) -> list[float]:
        """Return ``FoldImages.largest_norm``."""
        ...

    def fold_rows(self, centre: Tensor, each: FoldPass) -> list[FoldRows]:
        """Return ``FoldImages.rows``."""
        ...


class PartedFoldImages:
    """``FoldSourceImages`` in the memory of several processes.

    Args:
        parts: the processes.

    Raises:
        RuntimeError: The library was not built, or cannot be loaded.
    """

    def __init__(self, parts: FoldParts) -> None:
        self._parts = parts
        first = parts.blocks[0]
        self.block_size, self.count, self.shape = first.size, first.images, parts.shape
        self.processes = len(parts.blocks)
        self._lanes = int(_library().els_kernel_lanes(kernel_index(torch.device("cpu"), None)))
        found = parts.fold_sums()
        sums = self._in_order((0, self.count), [iter(sums) for sums, _ in found])
        self.centre = centre_of(sums)[:, None, None]
        self.largest = largest_of((ends for _, ends in found), self.centre)
        self._norms: dict[tuple[object, ...], float] = {}

    @property
    def groups(self) -> Sequence[Tensor]:
        """Stored images of the whole bank, mapped."""
        return self._parts.fold_images()

    @cached_property
    def spread(self) -> tuple[float, float]:
        """Mean square and largest norm of a centred pixel of the bank."""
        found = self._parts.fold_squares(self.centre)
        return spread_of(torch.stack(self._in_order((0, self.count), [iter(one) for one in found])))

    def largest_norm(self, frame: FoldFrame) -> float:
        """Return the largest norm of a patch of the bank, whatever the range; asked once."""
        if frame.keys_name not in self._norms:
            self._norms[frame.keys_name] = max(self._parts.fold_norms(self.centre, frame))
        return self._norms[frame.keys_name]

    def keys(self, frame: FoldFrame, ranges: list[tuple[int, int]]) -> int:
        """Return a bound of the number of keys of a query patch in ranges of images."""
        cell, (_, height, width) = frame.shape, self._parts.shape
        images = sum(hi - lo for lo, hi in ranges)
        return images * len(cell.rows.keys(height)) * len(cell.cols.keys(width))

    def ring(self, frame: FoldFrame) -> int:
        """Return the columns of a ring for any image of the bank."""
        return frame.lines()[1].ring([self._parts.shape[2]], self._lanes)

    def rows(self, each: FoldPass) -> FoldRows:
        """Return the results of a pass over the blocks of its ranges, in order."""
        found = self._parts.fold_rows(self.centre, each)
        blocks = sorted(
            {
                block
                for lo, hi in each.ranges
                for block in range(lo // self.block_size, -(-hi // self.block_size))
            }
        )
        owners = [block % self.processes for block in blocks]
        first = found[0]
        joined = {
            name: torch.stack(in_turn(owners, [iter(getattr(one, name)) for one in found]))
            for name in ("peaks", "totals", "planes", "scalars")
            if any(len(getattr(one, name)) for one in found)
        }
        if each.kind == STATISTICS:
            weights, codes, origins = merge_lists(found, each.numbers.get("top", 0))
            joined |= {"weights": weights, "codes": codes, "origins": origins}
            joined["shares"] = torch.cat(in_turn(owners, list(self._shares(each, blocks, found))))
        return first._replace(**joined)

    def _shares(
        self, each: FoldPass, blocks: list[int], found: list[FoldRows]
    ) -> Iterator[Iterator[Tensor]]:
        """Yield the shares of each process, block by block."""
        lengths: dict[int, int] = {}
        for block in blocks:
            lo, hi = block * self.block_size, (block + 1) * self.block_size
            lengths[block] = sum(max(0, min(hi, b) - max(lo, a)) for a, b in each.ranges)
        for index, one in enumerate(found):
            own = [lengths[block] for block in blocks if block % self.processes == index]
            yield iter(torch.split(one.shares, own)) if own else iter(())

    def _in_order(self, limits: tuple[int, int], parts: Sequence[Iterator[Tensor]]) -> list[Tensor]:
        lo, hi = limits
        owners = range(lo // self.block_size, -(-hi // self.block_size))
        return in_turn([block % self.processes for block in owners], parts)
