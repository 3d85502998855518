"""Queries of many callers become few launches, and nobody harms anybody else."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from dataclasses import replace
from typing import NoReturn

import numpy as np
import pytest
import torch
from tests.engine.conftest import Observed, Recorder, ask, held, query, turns, values

from els_service.config import Scheduling
from els_service.denoisers.base import DenoiserInfo, Query, SizeRange, make_query
from els_service.denoisers.levels import from_sigma
from els_service.engine.engine import Engine
from els_service.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)

BATCH_S = Scheduling().batch_s


async def test_queries_that_wait_together_are_computed_together(engine: Engine) -> None:
    recorder = Recorder()
    first = await held(engine, recorder)
    others = [ask(engine, i, -i) for i in range(1, 5)]
    await turns()
    recorder.go.set()
    answers = await asyncio.gather(*others)
    assert [values(answer) for answer in answers] == [[2 * i, -2 * i] for i in range(1, 5)]
    assert recorder.batches == [[0], [1, -1, 2, -2, 3, -3, 4, -4]]
    await first


async def test_an_image_that_costs_more_than_a_batch_is_computed_alone(engine: Engine) -> None:
    recorder = Recorder(10 * BATCH_S)
    engine.models.add("model", recorder)
    assert values(await ask(engine, 1, 2)) == [2, 4]
    assert recorder.batches == [[1], [2]]


async def test_a_caller_who_left_is_not_computed_and_its_mates_are_unharmed(
    engine: Engine, observed: Observed
) -> None:
    recorder = Recorder()
    first = await held(engine, recorder)
    stays, leaves, too = (ask(engine, i) for i in (1, 2, 3))
    await turns()
    leaves.cancel()
    await turns()
    recorder.go.set()
    assert [values(answer) for answer in await asyncio.gather(stays, too)] == [[2], [6]]
    assert recorder.batches == [[0], [1, 3]]
    assert leaves.cancelled()
    assert observed.reasons == ["cancelled"]
    await first


async def test_a_caller_who_leaves_while_its_batch_is_computed_harms_nobody(
    engine: Engine, observed: Observed
) -> None:
    recorder = Recorder()
    first = await held(engine, recorder)
    second = ask(engine, 1)
    first.cancel()
    await turns()
    recorder.go.set()
    assert values(await second) == [2]
    assert first.cancelled()
    assert observed.reasons == ["discarded"]


async def test_what_is_left_of_a_costly_query_is_not_computed_once_its_caller_left(
    engine: Engine,
) -> None:
    recorder = Recorder(BATCH_S)
    engine.models.add("model", recorder)
    recorder.go.clear()
    costly = ask(engine, 1, 2, 3)
    await recorder.until_entered()
    costly.cancel()
    await turns()
    recorder.go.set()
    assert values(await ask(engine, 9)) == [18]
    assert recorder.batches == [[1], [9]]


async def test_a_query_whose_deadline_passes_while_it_waits_is_not_computed(
    engine: Engine, observed: Observed
) -> None:
    recorder = Recorder()
    first = await held(engine, recorder)
    late = ask(engine, 1, deadline=time.monotonic() + 0.05)
    punctual = ask(engine, 2, deadline=time.monotonic() + 60)
    await asyncio.sleep(0.06)
    recorder.go.set()
    assert values(await punctual) == [4]
    with pytest.raises(DeadlineExceededError, match="in the queue of model: the deadline passed"):
        await late
    assert recorder.batches == [[0], [2]]
    assert observed.reasons == ["expired"]
    await first


async def test_who_gives_up_at_its_deadline_is_late_and_who_does_before_has_left(
    observed: Observed,
) -> None:
    now = 0.0
    engine, recorder = Engine(observed, clock=lambda: now), Recorder()
    try:
        first = await held(engine, recorder)
        # gRPC cancels a call whose deadline passes, and its caller does so a little before.
        for deadline, left_at in ((1.0, 1.01), (1.0, 0.985), (1.0, 0.9), (math.inf, 9.0)):
            now = 0.0
            gives_up = ask(engine, 1, deadline=deadline)
            await turns()
            now = left_at
            gives_up.cancel()
            await turns()
        recorder.go.set()
        await first
    finally:
        recorder.go.set()
        engine.close()
    assert observed.reasons == ["expired", "expired", "cancelled", "cancelled"]


async def test_a_query_that_comes_after_its_deadline_is_refused_at_the_door(
    engine: Engine, observed: Observed
) -> None:
    recorder = Recorder()
    engine.models.add("model", recorder)
    with pytest.raises(DeadlineExceededError, match="is predicted in"):
        await ask(engine, 1, deadline=-math.inf)
    assert recorder.batches == []
    assert observed.reasons == ["rejected_late"]


async def test_of_a_batch_that_fails_only_the_guilty_fails(
    engine: Engine, observed: Observed
) -> None:
    recorder = Recorder()
    recorder.fails_on = {2.0}
    first = await held(engine, recorder)
    batch = [ask(engine, i) for i in range(1, 6)]
    await turns()
    recorder.go.set()
    results = await asyncio.gather(*batch, return_exceptions=True)
    assert isinstance(results.pop(1), ZeroDivisionError)
    assert [values(good) for good in results if not isinstance(good, BaseException)] == [
        *([2], [6], [8], [10])
    ]
    assert observed.reasons == ["faulted"]
    await first


async def test_a_costly_query_of_which_a_part_fails_fails_once(engine: Engine) -> None:
    recorder = Recorder(BATCH_S)
    recorder.fails_on = {1.0, 2.0}
    engine.models.add("model", recorder)
    with pytest.raises(ZeroDivisionError):
        await ask(engine, 1, 2, 3)
    assert values(await ask(engine, 4)) == [8]


async def test_a_fault_that_would_end_a_thread_ends_nothing(engine: Engine) -> None:
    class Quitter(Recorder):
        def denoise(self, query: Query) -> NoReturn:
            raise SystemExit("as told")

    engine.models.add("quitter", Quitter())
    engine.models.add("model", Recorder())
    with pytest.raises(RuntimeError, match="the computation raised SystemExit"):
        await ask(engine, 1, model="quitter")
    assert values(await ask(engine, 2)) == [4]


async def test_small_work_runs_on_the_event_loop_and_other_work_does_not(engine: Engine) -> None:
    small, large = Recorder(1e-6), Recorder(1e-3)
    engine.models.add("small", small)
    engine.models.add("large", large)
    await ask(engine, 1, model="small")
    await ask(engine, 1, model="large")
    assert small.threads == [threading.get_ident()]
    assert large.threads != [threading.get_ident()]


async def test_small_work_joins_the_queue_while_its_model_is_busy(engine: Engine) -> None:
    recorder = Recorder()
    first = await held(engine, recorder)
    recorder.seconds = 1e-6
    small = ask(engine, 1)
    await turns()
    assert recorder.batches == [[0]]
    recorder.go.set()
    assert values(await small) == [2]
    await first


async def test_the_observer_is_told_of_every_item_and_batch(
    engine: Engine, observed: Observed
) -> None:
    recorder = Recorder()
    first = await held(engine, recorder)
    others = [ask(engine, i, i, trace=trace) for i, trace in ((1, "a"), (2, None))]
    await turns()
    before_ns = time.time_ns()
    recorder.go.set()
    await asyncio.gather(first, *others)
    assert observed.images == [1, 4]
    assert len(observed.waits) == 3
    assert min(observed.waits) >= 0
    (launch,) = observed.launches
    assert (launch.model, launch.device, launch.images) == ("model", "cpu", 4)
    assert launch.members == ("a", None)
    assert before_ns - 10**9 < launch.queued_ns[0] <= launch.started_ns <= launch.ended_ns
    assert launch.ended_ns < time.time_ns() + 10**8


async def test_a_query_that_does_not_fit_never_reaches_a_batch(engine: Engine) -> None:
    recorder = Recorder()
    engine.models.add("model", recorder)
    engine.models.starting = False
    with pytest.raises(InvalidArgumentError, match="x: expected shape"):
        engine.denoise(
            engine.models.find("model"),
            replace(query(1), pixels=np.zeros((1, 1, 5, 5), np.float32)),
        )
    with pytest.raises(NotFoundError, match="expected one of model, got 'other'"):
        await ask(engine, 1, model="other")
    assert recorder.batches == []


async def test_an_interrupted_engine_tells_everyone_and_takes_nothing_more(
    engine: Engine, observed: Observed
) -> None:
    recorder = Recorder()
    running = await held(engine, recorder)
    waiting = ask(engine, 1)
    await turns()
    engine.interrupt("it is late")
    for call in (running, waiting, ask(engine, 2)):
        with pytest.raises(UnavailableError, match="it is late"):
            await call
    assert observed.reasons == ["interrupted", "interrupted"]
    recorder.go.set()


async def test_a_broken_device_fails_its_batch_is_told_of_and_takes_nothing_more(
    engine: Engine,
) -> None:
    class Poisoned(Recorder):
        def denoise(self, query: Query) -> NoReturn:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    engine.models.add("model", Poisoned())
    with pytest.raises(UnavailableError, match="illegal memory access"):
        await ask(engine, 1)
    assert "cpu is broken" in await engine.lost
    with pytest.raises(UnavailableError, match="use another server"):
        await ask(engine, 2)


async def test_a_device_that_hangs_is_noticed_and_its_callers_are_told(observed: Observed) -> None:
    engine, recorder = Engine(observed, Scheduling(watchdog_s=0.05)), Recorder()
    try:
        hangs = await held(engine, recorder)
        waits = ask(engine, 1)
        for call in (hangs, waits):
            with pytest.raises(UnavailableError, match="cpu hangs"):
                await asyncio.wait_for(call, 30)
        assert "was not done after" in await engine.lost
    finally:
        recorder.go.set()
        engine.close()


async def test_what_fails_at_once_is_counted_as_what_fails_in_a_batch(
    engine: Engine, observed: Observed
) -> None:
    recorder = Recorder(seconds=1e-6)
    recorder.fails_on = {9.0}
    engine.models.add("model", recorder)
    with pytest.raises(ZeroDivisionError):
        await ask(engine, 9)
    assert observed.reasons == ["faulted"]
    assert observed.waits == []
    assert engine.models.find("model").statistics.settle().failed.count == 1


async def test_a_fresh_server_refuses_what_cannot_be_in_time_and_says_what_to_raise(
    engine: Engine,
) -> None:
    recorder = Recorder(seconds=8.0)
    engine.models.add("model", recorder)
    told = (
        r"of model is predicted in 8 s, of which 0 s waiting; 1\.9\d* s are left of the time"
        r" allowed: raise the call's deadline"
    )
    with pytest.raises(DeadlineExceededError, match=told):
        await ask(engine, 1, deadline=time.monotonic() + 1.95)
    # A wrong estimate shuts nobody out who has half the time: asking is how it is learned.
    assert values(await ask(engine, 2, deadline=time.monotonic() + 4)) == [4]
    assert recorder.batches == [[2]]


async def test_images_of_different_sizes_are_not_computed_together(engine: Engine) -> None:
    class AnySize(Recorder):
        @property
        def info(self) -> DenoiserInfo:
            return replace(super().info, sizes=SizeRange((1, 4), (1, 4)))

    recorder = AnySize()
    first = await held(engine, recorder)
    sizes = [(2, 3), (2, 3), (3, 2), (2, 3)]
    entry, others = engine.models.find("model"), []
    for i, size in enumerate(sizes, start=1):
        x = np.full((1, 1, *size), i, np.float32)
        answer = engine.denoise(entry, make_query(x, from_sigma([1.0])))
        assert isinstance(answer, asyncio.Future)
        others.append(answer)
    await turns()
    recorder.go.set()
    answers = await asyncio.gather(*others)
    assert [answer.pixels.shape[2:] for answer in answers] == sizes
    assert recorder.batches == [[0], [1, 2], [3], [4]]
    await first
