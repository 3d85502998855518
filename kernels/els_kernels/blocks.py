"""Blocks of a bank: the unit of sums over it, and of shards.

A bank is cut into blocks of one size in its order. Sums over a block depend on its images and on
the query's range in the whole bank alone, and are merged in one order in float64. So a process with
all blocks and several with every n-th each have the same bits.

Posteriors are merged by groups: block i is in group i mod 8, the blocks of a group are merged in
order, and then the groups. Of 1, 2, 4 or 8 processes each has whole groups, merges them itself and
sends few rows. Other sums are merged in the order of the bank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_ALIGNMENT = 16
"""Images of the widest vector: no block ends within a vector of any kernel."""
_LEAST, _MOST = 512, 8192
"""Images of a block: enough that its fixed cost is small, and few enough to be shared evenly."""
_GROUPS = 8
"""Of a bank, as in blocks.hpp."""
_COUNT = 64
"""Blocks of a bank that is neither small nor very large."""


def block_size(images: int) -> int:
    """Return the images of a block of a bank; the last block may have fewer."""
    size = -(-images // (_COUNT * _ALIGNMENT)) * _ALIGNMENT
    return min(max(size, _LEAST), _MOST)


@dataclass(frozen=True)
class Blocks:
    """The blocks of a bank that one process has: every ``stride``-th from ``first`` on.

    Images of a process are those of its blocks, one block behind another.
    """

    images: int
    """Of the whole bank."""
    size: int
    """Images of a block, a multiple of 16."""
    first: int = 0
    stride: int = 1

    @classmethod
    def whole(cls, images: int) -> Blocks:
        """Return all blocks of a bank."""
        return cls(images, block_size(images))

    def shard(self, index: int, shards: int) -> Blocks:
        """Return the blocks of one of several processes."""
        return Blocks(self.images, self.size, index, shards)

    @property
    def count(self) -> int:
        """Number of blocks of the whole bank."""
        return -(-self.images // self.size)

    @property
    def limits(self) -> list[tuple[int, int]]:
        """Half-open ranges of the whole bank: the images of this process, in order."""
        return [
            (index * self.size, min(self.images, (index + 1) * self.size))
            for index in range(self.first, self.count, self.stride)
        ]

    def runs(self, lo: int, hi: int) -> list[tuple[int, int]]:
        """Return the parts of a range of the whole bank that this process has, in order."""
        found = [(max(lo, start), min(hi, stop)) for start, stop in self.limits]
        return [(start, stop) for start, stop in found if start < stop]

    @property
    def grouped(self) -> bool:
        """Whether this process has all blocks of its groups."""
        return _GROUPS % self.stride == 0

    def rows(self, lo: int, hi: int) -> list[int]:
        """Return the group of each row of a posterior over a range of the whole bank, in order.

        The block of each row, by group, if this process lacks blocks of its groups.
        """
        return self._by_group(start // self.size for start, _ in self.runs(lo, hi))

    def owners(self, lo: int, hi: int) -> list[int]:
        """Return the first block of the owner of each row of a range, among ``stride`` processes.

        Rows are those of all processes, in the order in which they are merged.
        """
        rows = self._by_group(range(lo // self.size, -(-hi // self.size)))
        return [row % self.stride for row in rows]

    def _by_group(self, blocks: Iterable[int]) -> list[int]:
        if self.grouped:
            return sorted({block % _GROUPS for block in blocks})
        return sorted(blocks, key=lambda block: block % _GROUPS)

    def everywhere(self, origins: Tensor) -> Tensor:
        """Return origins [..., 2] of own images as those of the whole bank; −1 stays."""
        if self.stride == 1:
            return origins
        image = origins[..., 0]
        block = image.div(self.size, rounding_mode="floor") * self.stride + self.first
        moved = block * self.size + image.remainder(self.size)
        return torch.stack([torch.where(image < 0, image, moved), origins[..., 1]], -1)

    def local(self, image: int) -> int:
        """Return the place of an image of the whole bank among those of this process."""
        block, offset = divmod(image, self.size)
        return (block - self.first) // self.stride * self.size + offset
