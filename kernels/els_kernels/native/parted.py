"""A bank whose blocks are in several processes: the bits of ``Native``, merged here.

The others answer for their blocks; what queries have in common, and the order in which answers are
merged, is in this process. See ``blocks``.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from els_kernels.blocked_moments import Level, MomentPass
from els_kernels.blocks import Blocks
from els_kernels.geometry import Geometry, Posterior
from els_kernels.native.attend_call import Rows
from els_kernels.native.bank import Arguments, Native
from els_kernels.native.binding import _library, kernel_index
from els_kernels.native.moments_call import STATISTICS, MomentCall, MomentRows

T = TypeVar("T")
_ABSENT = -3e38
"""Logit of a row of a process that did not answer, in bits."""


class BankParts(Protocol):
    """Processes that have the blocks of a bank between them: the i-th every n-th from i on.

    Each method but ``rows`` returns the answers of all, in order.
    """

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        ...

    @property
    def blocks(self) -> list[Blocks]:
        """Blocks of each process."""
        ...

    @property
    def centre(self) -> Tensor:
        """[C] float64: mean of the whole bank."""
        ...

    @property
    def largest(self) -> float:
        """Largest |pixel| of the whole bank, from its centre."""
        ...

    def exclusive(self) -> AbstractContextManager[object]:
        """Return a context in which the rows that were answered last stay valid."""
        ...

    def rows(
        self,
        x: Tensor,
        a: list[float],
        s: list[float],
        window: list[int],
        ranges: list[tuple[int, int]],
        geometry: Geometry,
        *,
        partial: bool = False,
    ) -> Generator[tuple[int, Rows | None]]:
        """Yield the index of each process and its ``Native.rows``, in the order of arrival.

        To be called, exhausted or closed within ``exclusive``. If a process is lost, others may
        have to answer again: the later rows of an index replace the earlier ones, which are no
        longer valid. With ``partial`` a lost process is not asked again, and its rows are None.
        """
        ...

    def moment_rows(self, call: MomentCall) -> list[MomentRows]:
        """Return ``Native.moment_rows``."""
        ...

    def exact_parts(
        self, level: Level, limits: tuple[int, int]
    ) -> list[list[tuple[Tensor, Tensor]]]:
        """Return ``Native.exact_parts``."""
        ...

    def block_answers(self, level: Level, each: MomentPass) -> list[list[tuple[Tensor, ...]]]:
        """Return ``blocked_moments.block_answers``."""
        ...

    def square_norm(self, window: int) -> list[float]:
        """Return ``Native.square_norm``."""
        ...

    def block_squares(self) -> list[list[float]]:
        """Return ``Native.block_squares``."""
        ...


class PartedNative(Native):
    """A packed bank in the memory of several processes.

    Args:
        parts: the processes.

    Raises:
        RuntimeError: The library was not built, or cannot be loaded.
    """

    def __init__(self, parts: BankParts) -> None:
        self.parts = parts
        """The processes."""
        self.kernel = kernel_index(torch.device("cpu"), None)
        first = parts.blocks[0]
        self.blocks = Blocks(first.images, first.size)
        self.shape = torch.Size((first.images, *parts.shape))
        self.centre, self.largest = parts.centre, parts.largest
        self.lanes = int(_library().els_kernel_lanes(self.kernel))
        self.packed = torch.empty(0)

    def attend(
        self,
        x: Tensor,
        a: list[float],
        s: list[float],
        window: list[int],
        ranges: list[tuple[int, int]],
        geometry: Geometry,
    ) -> Posterior:
        """Return the posteriors of the whole bank."""
        return self._merged((x.contiguous(), a, s, window, ranges, geometry))[0]

    def has_far(
        self,
        x: Tensor,
        a: list[float],
        s: list[float],
        window: list[int],
        ranges: list[tuple[int, int]],
        geometry: Geometry,
    ) -> bool:
        """Return whether float32 does not resolve a query: see ``far_queries``."""
        return bool(self._unresolved(x, a, s, window, geometry))

    def attend_some(
        self,
        x: Tensor,
        a: list[float],
        s: list[float],
        window: list[int],
        ranges: list[tuple[int, int]],
        geometry: Geometry,
    ) -> tuple[Posterior, list[float]]:
        """Return the posteriors of the processes that can be asked, and each image's share.

        A share is that of the images of a range that answered; if it is 0, there is no posterior.
        """
        arguments = x.contiguous(), a, s, window, ranges, geometry
        answer, parts = self._merged(arguments, partial=True)
        shares = []
        for lo, hi in ranges:
            answered = 0
            for block in range(lo // self.blocks.size, -(-hi // self.blocks.size)):
                start = block * self.blocks.size
                own = min(hi, start + self.blocks.size) - max(lo, start)
                answered += own * parts[block % len(parts)]
            shares.append(answered / (hi - lo))
        return answer, shares

    @property
    def _grouped(self) -> bool:
        return self.parts.blocks[0].grouped

    def _merged(
        self, arguments: Arguments, *, partial: bool = False
    ) -> tuple[Posterior, list[bool]]:
        """Return the posteriors of the rows of all processes, and which of these answered."""
        _, _, _, _, ranges, _ = arguments
        with (
            self.parts.exclusive(),
            contextlib.closing(self.parts.rows(*arguments, partial=partial)) as answers,
        ):
            found = dict([next(answers)])
            # While the others compute.
            blocks = self.parts.blocks[0]
            owners = [owner for limits in ranges for owner in blocks.owners(*limits)]
            merge = self.merging(*arguments)
            found.update(answers)
            rows = [found[i] for i in range(len(found))]
            peaks, sums = zip(*map(self._own_addresses, rows), strict=True)
            answer = merge.run((in_turn(owners, peaks), in_turn(owners, sums)))
        return answer, [one is not None for one in rows]

    def _own_addresses(self, rows: Rows | None) -> tuple[Iterator[int], Iterator[int]]:
        if rows is None:
            (peak,), (sums,) = self._absent.addresses()
            return itertools.repeat(peak), itertools.repeat(sums)
        peaks, sums_of = rows.addresses()
        return iter(peaks), iter(sums_of)

    @cached_property
    def _absent(self) -> Rows:
        """A row of a process that did not answer: a weight of 0 beside any other."""
        channels, height, width = self.shape[1:]
        return Rows(
            torch.full((1, height, width), _ABSENT),
            torch.zeros(1, 1 + channels, height, width, dtype=torch.float64),
        )

    def exact_parts(
        self,
        x: Tensor,
        a: float,
        s: float,
        window: int,
        limits: tuple[int, int],
        geometry: Geometry,
    ) -> list[tuple[Tensor, Tensor]]:
        """Return mean and log evidence of one image over each block, float64."""
        found = self.parts.exact_parts(Level(x, a, s, window, geometry), limits)
        return self._in_order(limits, [iter(part) for part in found])

    def passes(self, level: Level, each: MomentPass) -> list[tuple[Tensor, ...]]:
        """Return the answers of all blocks to a pass of moments in torch, in order."""
        found = self.parts.block_answers(level, each)
        return self._in_order(each.limits, [iter(part) for part in found])

    def moment_rows(self, call: MomentCall) -> MomentRows:
        """Return the results of a pass of moments over all blocks, in order."""
        found = self.parts.moment_rows(call)
        blocks = self.parts.blocks
        sums = self._stacked(call.limits, [part.sums for part in found])
        peaks = found[0].peaks
        if call.kind == STATISTICS:
            peaks = self._stacked(call.limits, [part.peaks for part in found])
        shares = found[0].shares
        if any(len(part.shares) for part in found):
            lengths = [[hi - lo for lo, hi in own.runs(*call.limits)] for own in blocks]
            split = [
                iter(torch.split(part.shares, own))
                for part, own in zip(found, lengths, strict=True)
            ]
            shares = torch.cat(self._in_order(call.limits, split))
        logits, origins = _ranked(found, self.lanes)
        return MomentRows(peaks, sums, logits, origins, shares)

    def square_norm(self, window: int) -> float:
        """Return the largest squared norm of a patch of the centred bank, or a bound of it."""
        return max(self.parts.square_norm(window))

    def block_squares(self) -> list[float]:
        """Return the sum of the squared pixels of each block of the centred bank, in order."""
        found = [iter(part) for part in self.parts.block_squares()]
        return self._in_order((0, self.blocks.images), found)

    def _stacked(self, limits: tuple[int, int], parts: list[Tensor]) -> Tensor:
        """Return rows [R, ...] of all blocks in order."""
        if not any(len(part) for part in parts):
            return parts[0]
        return torch.stack(self._in_order(limits, [iter(part) for part in parts]))

    def _in_order(self, limits: tuple[int, int], parts: Sequence[Iterator[T]]) -> list[T]:
        """Return the answers of the blocks of a range, each the next of the process that has it."""
        lo, hi = limits
        size = self.blocks.size
        return in_turn([block % len(parts) for block in range(lo // size, -(-hi // size))], parts)


def in_turn(owners: Sequence[int], parts: Sequence[Iterator[T]]) -> list[T]:
    """Return the next answer of the owner of each block."""
    return [next(parts[owner]) for owner in owners]


def _ranked(found: list[MomentRows], lanes: int) -> tuple[Tensor, Tensor]:
    """Return the listed sources of all processes as one would list them.

    Of falling logit; equal ones in the order of the tiles, and within a tile as they were listed.
    """
    top = found[0].logits.shape[-1]
    if len(found) == 1 or not top:
        return found[0].logits, found[0].origins
    logits = torch.cat([part.logits for part in found], -1)
    origins = torch.cat([part.origins for part in found], -2)
    order = (origins[..., 0] // lanes).argsort(dim=-1, stable=True)
    order = order.gather(-1, logits.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
    order = order[..., :top]
    pairs = order[..., None].expand(*order.shape, 2)
    return logits.gather(-1, order), origins.gather(-2, pairs)
