"""Shards asked together, in the order of events that processes rarely have."""

from __future__ import annotations

import contextlib
import gc
import mmap
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.sharded_models import block_bank, eventually

from els_kernels import GEOMETRIES, ComputationStoppedError, Control
from els_service.errors import ElsError
from els_service.shards.messages import Array, Message
from els_service.shards.shard import ShardLostError
from els_service.shards.shard_set import ShardSet
from els_service.shards.shared_control import SharedControl


class _HeldShard:
    """A shard in this process that answers when a test does it."""

    def __init__(self) -> None:
        self.asked: list[tuple[Message, Future[Message]]] = []

    def ask(self, operation: Message) -> Future[Message]:
        answer = Future[Message]()
        self.asked.append((operation, answer))
        return answer

    def stop(self, number: int) -> None:
        pass

    def close(self) -> None:
        pass


class _LostShard(_HeldShard):
    """A shard in this process that is lost until a test has it ready, and then answers, or not."""

    name, ready, silent = "1", False, False

    def ask(self, operation: Message) -> Future[Message]:
        answer = super().ask(operation)
        if not self.ready:
            answer.set_exception(ShardLostError("lost"))
        elif not self.silent:
            answer.set_result(_empty(operation))
        return answer


def _empty(operation: Message) -> Message:
    return Message("answer", {"seconds": 0.0}, [], operation.number)


class _ControlledShard(_HeldShard):
    """A shard in this process whose operations can be stopped."""

    name = "0"

    def __init__(self) -> None:
        super().__init__()
        self.control = SharedControl(mmap.mmap(-1, 4096))

    def stop(self, number: int) -> None:
        if any(operation.number == number for operation, _ in self.asked):
            self.control.stop(number)


def test_a_failed_operation_leaves_no_memory_to_the_garbage_collector() -> None:
    bank: Any = block_bank()
    held: Any = [_HeldShard(), _HeldShard()]
    shards = ShardSet("bank", bank, held, [], torch.zeros(1), 1.0)
    sent, returned = np.zeros(10), np.zeros(10)
    kept = [weakref.ref(sent), weakref.ref(returned)]

    def answer(rows: Array) -> None:
        eventually(lambda: held[1].asked)
        (_, failed), (operation, late) = (shard.asked.pop() for shard in held)
        failed.set_exception(ElsError("spoilt"))
        late.set_result(Message("answer", {"seconds": 0.0}, [rows], operation.number))

    gc.disable()
    try:
        with ThreadPoolExecutor(1) as other:
            answering = other.submit(answer, returned)
            with pytest.raises(ElsError, match="spoilt"):
                shards.ask("rows", {}, [sent])
            answering.result()
        del sent, returned, answering
        assert [one() for one in kept] == [None, None]
    finally:
        gc.enable()


def test_an_operation_that_fails_when_asked_again_leaves_no_memory_either() -> None:
    bank: Any = block_bank()
    lost = _LostShard()
    both: Any = [_HeldShard(), lost]
    shards = ShardSet("bank", bank, both, [], torch.zeros(1), 10.0)
    sent = np.zeros(10)
    kept = weakref.ref(sent)

    def answer() -> None:
        eventually(lambda: len(lost.asked) == 1)
        lost.silent = lost.ready = True
        eventually(lambda: len(lost.asked) == 2)
        lost.asked[1][1].set_exception(ElsError("spoilt"))

    gc.disable()
    try:
        with ThreadPoolExecutor(1) as other:
            answering = other.submit(answer)
            with pytest.raises(ElsError, match="spoilt"):
                shards.ask("rows", {}, [sent])
            answering.result()
        for shard in both:
            shard.asked.clear()
        del sent, answering
        assert kept() is None
    finally:
        gc.enable()


def test_rows_come_as_shards_answer_and_no_more_are_computed_for_a_caller_that_leaves() -> None:
    bank: Any = block_bank()
    held: Any = [_ControlledShard(), _ControlledShard()]
    shards = ShardSet("bank", bank, held, [], torch.zeros(1), 1.0)
    arguments = torch.zeros(1, 1, 2, 2), [1.0], [1.0], [1], [(0, 1)], GEOMETRIES["els", "zeros"]

    def answer(index: int) -> None:
        eventually(lambda: held[index].asked)
        operation, future = held[index].asked.pop()
        rows: list[Array] = [np.zeros((1, 2, 2), np.float32), np.zeros((1, 2, 2, 2))]
        future.set_result(Message("answer", {"seconds": 0.0}, rows, operation.number))

    with (
        shards.exclusive(),
        contextlib.closing(shards.rows(*arguments)) as answers,
        ThreadPoolExecutor(1) as other,
    ):
        other.submit(answer, 1)
        index, rows = next(answers)
        assert index == 1
        assert rows is not None
        assert rows.sums.shape == (1, 2, 2, 2)
        ((operation, _),) = held[0].asked
        begun = held[0].control.begin(operation.number)
    assert begun.stopped


def test_who_is_cancelled_ends_no_operation_of_a_caller_that_waits_for_a_shard() -> None:
    bank: Any = block_bank()
    one, other = _ControlledShard(), _LostShard()
    both: Any = [one, other]
    shards = ShardSet("bank", bank, both, [], torch.zeros(1), 10.0)
    control = Control()

    def cancelled() -> None:
        with pytest.raises(ComputationStoppedError), control:
            shards.ask("rows", {}, [])

    with ThreadPoolExecutor(2) as callers:
        first = callers.submit(cancelled)
        eventually(lambda: len(one.asked) == 1)
        second = callers.submit(shards.ask, "rows", {}, [])
        eventually(lambda: len(one.asked) == 2)
        # Both wait for the other shard. The process has begun the operation of the second, and the
        # server has not read the answer to the first.
        (earlier, answer), (later, _) = one.asked
        begun = one.control.begin(later.number)
        control.stop()
        first.result()
        answer.set_result(_empty(earlier))
        assert begun.stopped
        one.asked[1][1].set_exception(ComputationStoppedError("stopped"))
        other.ready = True
        eventually(lambda: len(one.asked) == 3)
        operation, again = one.asked[2]
        again.set_result(_empty(operation))
        assert [message.op for message in second.result()] == ["answer", "answer"]


def test_a_later_stop_of_an_earlier_operation_withdraws_no_stop() -> None:
    shared = SharedControl(mmap.mmap(-1, 4096))
    shared.stop(7)
    shared.stop(5)
    assert shared.begin(7).stopped
    assert not shared.begin(8).stopped
