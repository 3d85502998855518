"""Blocks of a bank in several packed banks of this process."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from els_kernels.blocked_moments import Level, MomentPass, block_answers
from els_kernels.blocks import Blocks
from els_kernels.native import Native
from els_kernels.native.block_sums import block_sums, centre_of
from els_kernels.native.moments_call import MomentCall


class OwnParts:
    """``BankParts`` without processes."""

    def __init__(self, bank: Tensor, count: int) -> None:
        whole = Blocks.whole(len(bank))
        self.shape = (bank.shape[1], bank.shape[2], bank.shape[3])
        self.blocks = [whole.shard(i, count) for i in range(count)]
        slices = [torch.cat([bank[lo:hi] for lo, hi in own.limits]) for own in self.blocks]
        sums = [block_sums(part, own) for part, own in zip(slices, self.blocks, strict=True)]
        self.centre = centre_of(sums[i % count][i // count] for i in range(whole.count))
        self._natives = [
            Native(part, blocks=own, centre=self.centre)
            for part, own in zip(slices, self.blocks, strict=True)
        ]
        self.largest = max(native.largest for native in self._natives)
        self._bank = bank

    def _all(self, ask: Callable[[Native], Any]) -> list[Any]:
        return [ask(native) for native in self._natives]

    def exclusive(self) -> AbstractContextManager[None]:
        return nullcontext()

    def rows(self, *arguments: Any, partial: bool = False) -> Generator[tuple[int, Any]]:
        """With ``partial`` all but those of the second part."""
        for i, native in enumerate(self._natives):
            yield i, None if partial and i == 1 else native.rows(*arguments)

    def moment_rows(self, call: MomentCall) -> list[Any]:
        return self._all(lambda native: native.moment_rows(call))

    def exact_parts(self, level: Level, limits: tuple[int, int]) -> list[Any]:
        x, a, s, window, geometry = level
        return self._all(lambda native: native.exact_parts(x, a, s, window, limits, geometry))

    def block_answers(self, level: Level, each: MomentPass) -> list[Any]:
        return [
            block_answers(lambda lo, hi: self._bank[lo:hi], own, level, each) for own in self.blocks
        ]

    def square_norm(self, window: int) -> list[float]:
        return self._all(lambda native: native.square_norm(window))

    def block_squares(self) -> list[list[float]]:
        return self._all(lambda native: native.block_squares())
