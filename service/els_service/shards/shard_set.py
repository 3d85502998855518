"""The shards of a bank, asked together: all answer, or the call fails."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Any

from torch import Tensor

from els_kernels.blocked_moments import Level, MomentPass
from els_kernels.blocks import Blocks
from els_kernels.control import Control, current
from els_kernels.geometry import Geometry
from els_kernels.native.attend_call import Rows
from els_kernels.native.moments_call import MomentCall, MomentRows
from els_service.denoisers.mapped_banks import MappedBank
from els_service.errors import UnavailableError
from els_service.shards.messages import Array, Message, numbered
from els_service.shards.shard import Shard, ShardLostError
from els_service.shards.values import array_of, geometry_fields, level_fields, tensors_of

_POLL_S = 0.05
"""Seconds between two looks at the control of a call."""
_RETRY_S = 5.0
"""Seconds after which a caller may ask again while a shard is being started."""
_LIVE: weakref.WeakSet[ShardSet] = weakref.WeakSet()


@dataclass(eq=False)
class ShardStatistics:
    """Counts of the questions to one shard."""

    count: int = 0
    seconds: float = 0.0
    """From the question to the answer; ``slowest_s`` is that of the computation alone."""
    asked_again: int = 0
    """Operations that were asked again after the shard was lost."""


class ShardsUnavailableError(UnavailableError):
    """A shard is lost and did not come back in time; a retry may succeed."""

    retry_after_s = _RETRY_S


@dataclass(eq=False)
class _Asked:
    """One operation at one shard."""

    index: int
    operation: Message
    answer: Future[Message]
    begun: float
    again: bool = False


class ShardSet:
    """``BankParts`` in other processes.

    Args:
        name: of the bank, in metrics.
        bank: its labels and provenance; its images are in the shards.
        shards: loaded, not yet packed.
        blocks: of each of them.
        centre: of the whole bank, [C] float64.
        restart_s: seconds that a call waits for a lost shard.
    """

    def __init__(
        self,
        name: str,
        bank: MappedBank,
        shards: Sequence[Shard],
        blocks: Sequence[Blocks],
        centre: Tensor,
        restart_s: float,
    ) -> None:
        self.name, self.shards, self.blocks = name, list(shards), list(blocks)
        self.bank, self.shape, self.centre = bank, bank.shape, centre
        self.largest = 0.0
        """Set by ``pack``."""
        self.slowest_s = 0.0
        """Seconds that the slowest shard computed for the latest operation."""
        self.statistics = [ShardStatistics() for _ in shards]
        self._restart_s = restart_s
        self._squares: list[list[float]] = []
        self._norms: dict[int, list[float]] = {}
        self._failed_until = 0.0
        self._asked = 0
        """Messages and stops so far: an answer is where the next one to its shard will be."""
        self._lock = threading.RLock()
        self._turn = threading.Condition(self._lock)
        """Waits for a lost shard without the lock, which others take meanwhile."""
        self._finalizer = weakref.finalize(self, _close_all, self.shards)
        _LIVE.add(self)

    def pack(self) -> None:
        """Pack the bank for patch attention, in all shards; once.

        Raises:
            ShardsUnavailableError: A shard is lost and does not come back in time.
        """
        if self._squares:
            return
        centre = self.centre.numpy()
        for shard in self.shards:
            shard.keep(centre)
        prepared = self.ask("prepare", {}, [centre])
        self.largest = max(answer.fields["largest"] for answer in prepared)
        self._squares = [answer.arrays[0].tolist() for answer in prepared]

    def close(self) -> None:
        """End all processes; done anyway with the last reference."""
        self._finalizer()

    def exclusive(self) -> AbstractContextManager[object]:
        """Return a context in which the rows that were answered last stay valid."""
        return self._lock

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
        """Yield the rows of every shard; see ``BankParts``. The caller is in ``exclusive``."""
        fields = {"a": a, "s": s, "window": window, "ranges": ranges} | geometry_fields(geometry)
        # Not copied: no other operation overwrites them before the context ends.
        for index, one in self._answers("rows", fields, [array_of(x)], partial=partial):
            yield index, None if one is None else Rows(*tensors_of(one))

    def moment_rows(self, call: MomentCall) -> list[MomentRows]:
        """Return the rows of a pass of moments of every shard."""
        fields = {
            "kind": call.kind,
            "window": call.window,
            "top": call.top,
            "limits": call.limits,
            "numbers": call.numbers,
            "inputs": list(call.inputs),
        } | geometry_fields(call.geometry)
        found = self.ask("moments", fields, [array_of(each) for each in call.inputs.values()])
        return [MomentRows(*tensors_of(one)) for one in found]

    def exact_parts(
        self, level: Level, limits: tuple[int, int]
    ) -> list[list[tuple[Tensor, Tensor]]]:
        """Return mean and log evidence of the blocks of every shard."""
        fields = level_fields(level) | {"limits": limits}
        found = self.ask("exact", fields, [array_of(level.x)])
        return [[(each[:-1], each[-1]) for each in tensors_of(one)] for one in found]

    def block_answers(self, level: Level, each: MomentPass) -> list[list[tuple[Tensor, ...]]]:
        """Return the answers of the blocks of every shard to a pass of moments in torch."""
        fields = level_fields(level)
        fields |= {"kind": each.kind, "limits": each.limits, "top": each.top}
        arrays = [array_of(level.x), *(array_of(tensor) for tensor in each.inputs)]
        answers = []
        for one in self.ask("answers", fields, arrays):
            tensors, blocks = tensors_of(one), one.fields["blocks"]
            size = len(tensors) // max(1, blocks)
            answers.append([tuple(tensors[i * size : (i + 1) * size]) for i in range(blocks)])
        return answers

    def square_norm(self, window: int) -> list[float]:
        """Return the largest squared norm of a patch of every shard; asked once."""
        if window not in self._norms:
            found = self.ask("norm", {"window": window}, [])
            self._norms[window] = [one.fields["norm"] for one in found]
        return self._norms[window]

    def block_squares(self) -> list[list[float]]:
        """Return the sum of the squared pixels of the blocks of every shard."""
        return self._squares

    def ask(self, op: str, fields: dict[str, Any], arrays: Sequence[Array]) -> list[Message]:
        """Return the answers of all shards; a lost shard is asked once more when it is back.

        Args:
            op: operation of ``BankPart``.
            fields: its values.
            arrays: its arrays.

        Raises:
            ShardsUnavailableError: A shard did not come back in time, or was lost again.
            ComputationStoppedError: The current ``Control`` was stopped.
        """
        with self._lock:
            found = {index: one for index, one in self._answers(op, fields, arrays) if one}
            return [_owned(found[index]) for index in range(len(self.shards))]

    def _answers(
        self, op: str, fields: dict[str, Any], arrays: Sequence[Array], *, partial: bool = False
    ) -> Generator[tuple[int, Message | None]]:
        """Yield shard and answer as they arrive; again, if a shard was asked again.

        Arrays may be in memory that the next operation overwrites: the caller has the lock. With
        ``partial`` a lost shard is not asked again, and its answer is None.
        """
        control = current() or Control()
        asked = self._put(numbered(op, fields, arrays), range(len(self.shards)))
        try:
            yield from self._gather(asked, control, partial=partial)
        except BaseException:
            self._stop(asked)
            asked.clear()
            raise

    def _put(self, message: Message, shards: Iterable[int]) -> list[_Asked]:
        found = []
        for index in shards:
            self._asked += 1
            answer = self.shards[index].ask(message)
            found.append(_Asked(index, message, answer, time.monotonic()))
        return found

    def _stop(self, asked: Sequence[_Asked]) -> None:
        # A stop may meet the next operation of a shard, if a caller of it waits for another shard:
        # that caller then asks all again.
        self._asked += 1
        for one in asked:
            self.shards[one.index].stop(one.operation.number)

    def _gather(
        self, asked: list[_Asked], control: Control, *, partial: bool
    ) -> Iterator[tuple[int, Message | None]]:
        missing = {one.index for one in asked}
        done: SimpleQueue[tuple[int, int]] = SimpleQueue()
        for one in asked:
            _notify(one, done)
        self.slowest_s = 0.0
        while missing:
            try:
                index, number = done.get(timeout=_POLL_S)
            except Empty:
                index, number = 0, 0
            # Also progress of this computation: a shard without progress is ended elsewhere.
            control.advance()
            one = asked[index]
            if one.operation.number != number:
                continue  # no answer yet, or that of an operation that was asked again
            error = one.answer.exception()
            if error is None:
                missing.discard(index)
                yield index, self._counted(one)
            elif not isinstance(error, ShardLostError):
                try:
                    raise error
                finally:
                    # Its traceback refers to this frame: a cycle would keep the arrays.
                    del error, one
            elif partial:
                missing.discard(index)
                yield index, None
            else:
                again = self._ask_again(asked, one, control)
                while again:  # of which this frame keeps none, see above
                    missing.add(_notify(again.pop(), done))

    def _ask_again(self, asked: list[_Asked], lost: _Asked, control: Control) -> list[_Asked]:
        """Ask a lost shard once it is back; all, if others asked them meanwhile."""
        before = self._asked
        self._await(lost, control)
        self.statistics[lost.index].asked_again += 1
        needed = [lost]
        if self._asked != before:
            # Answers to others are where those of this call were.
            self._stop(asked)
            needed = [*asked]
        message = numbered(lost.operation.op, lost.operation.fields, lost.operation.arrays)
        found = self._put(message, [one.index for one in needed])
        for one, earlier in zip(found, needed, strict=True):
            one.again = earlier.again or earlier is lost
            asked[one.index] = one
        return found

    def _await(self, one: _Asked, control: Control) -> None:
        """Wait for a lost shard; other callers may ask meanwhile."""
        shard, limit = self.shards[one.index], time.monotonic() + self._restart_s
        if one.again:
            raise self._unavailable(shard, "; it was asked twice")
        if time.monotonic() < self._failed_until and not shard.ready:
            # A moment ago others waited for it without success.
            raise self._unavailable(shard)
        while not shard.ready:
            if time.monotonic() > limit:
                self._failed_until = time.monotonic() + _RETRY_S
                raise self._unavailable(shard, f"; not back after {self._restart_s:g} s")
            self._turn.wait(_POLL_S)
            control.advance()

    def _unavailable(self, shard: Shard, more: str = "") -> ShardsUnavailableError:
        # Why is in the log: the reason may have paths of the server.
        text = f"the bank {self.name} is incomplete: shard {shard.name} is not ready{more}"
        return ShardsUnavailableError(text)

    def _counted(self, one: _Asked) -> Message:
        """Return the answer of a shard, counted."""
        answer, statistics = one.answer.result(), self.statistics[one.index]
        statistics.count += 1
        statistics.seconds += time.monotonic() - one.begun
        self.slowest_s = max(self.slowest_s, answer.fields["seconds"])
        return answer


def _notify(one: _Asked, done: SimpleQueue[tuple[int, int]]) -> int:
    """Put shard and number into a queue when there is an answer, or none will come; return shard.

    Neither refers to the answer, which has the callback: a cycle would keep its arrays.
    """
    key = one.index, one.operation.number
    one.answer.add_done_callback(lambda _: done.put(key))
    return one.index


def live_sets() -> list[ShardSet]:
    """Return all sets of shards of this process, for metrics."""
    return sorted(_LIVE, key=lambda one: one.name)


def _owned(message: Message) -> Message:
    """Return a message whose arrays have memory of their own."""
    arrays = [array if array.flags.owndata else array.copy() for array in message.arrays]
    return replace(message, arrays=arrays)


def _close_all(shards: Sequence[Shard]) -> None:
    for shard in shards:
        shard.close()
