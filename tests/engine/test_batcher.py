"""Queries of many callers become few batches, and nobody harms anybody else."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.engine.conftest import Observed, Recorder, query, turns, values

from els_service.engine.batcher import MAX_BATCH_S
from els_service.engine.engine import Engine
from els_service.errors import DeadlineExceededError, InvalidArgumentError, NotFoundError


async def held(engine: Engine, recorder: Recorder) -> asyncio.Task[object]:
    """Return a call whose batch is being computed until ``recorder.go`` is set."""
    engine.add("model", recorder)
    recorder.go.clear()
    first = asyncio.ensure_future(engine.denoise("model", query(0)))
    await recorder.until_entered()
    return first


async def test_queries_that_wait_together_are_computed_together(engine: Engine) -> None:
    recorder = Recorder()
    first = await held(engine, recorder)
    others = [asyncio.ensure_future(engine.denoise("model", query(i, -i))) for i in range(1, 5)]
    await turns()
    recorder.go.set()
    answers = await asyncio.gather(*others)
    assert [values(answer) for answer in answers] == [[2 * i, -2 * i] for i in range(1, 5)]
    assert recorder.batches == [[0], [1, -1, 2, -2, 3, -3, 4, -4]]
    await first


async def test_a_batch_ends_where_its_time_does(engine: Engine) -> None:
    recorder = Recorder(MAX_BATCH_S / 2)
    first = await held(engine, recorder)
    others = [asyncio.ensure_future(engine.denoise("model", query(i))) for i in range(1, 6)]
    await turns()
    recorder.go.set()
    await asyncio.gather(first, *others)
    assert recorder.batches == [[0], [1, 2], [3, 4], [5]]


async def test_a_costly_query_is_cut_so_that_others_get_between(engine: Engine) -> None:
    recorder = Recorder(MAX_BATCH_S / 2)
    engine.add("model", recorder)
    recorder.go.clear()
    costly = asyncio.ensure_future(engine.denoise("model", query(1, 2, 3, 4, 5)))
    await recorder.until_entered()
    other = asyncio.ensure_future(engine.denoise("model", query(6)))
    await turns()
    recorder.go.set()
    assert values(await other) == [12]
    assert values(await costly) == [2, 4, 6, 8, 10]
    assert recorder.batches == [[1, 2], [6], [3, 4], [5]]


async def test_an_image_that_costs_more_than_a_batch_is_computed_alone(engine: Engine) -> None:
    recorder = Recorder(10 * MAX_BATCH_S)
    engine.add("model", recorder)
    assert values(await engine.denoise("model", query(1, 2))) == [2, 4]
    assert recorder.batches == [[1], [2]]


async def test_a_caller_who_left_is_not_computed_and_its_mates_are_unharmed(
    engine: Engine,
) -> None:
    recorder = Recorder()
    first = await held(engine, recorder)
    stays, leaves, too = (
        asyncio.ensure_future(engine.denoise("model", query(i))) for i in (1, 2, 3)
    )
    await turns()
    leaves.cancel()
    await turns()
    recorder.go.set()
    assert [values(answer) for answer in await asyncio.gather(stays, too)] == [[2], [6]]
    assert recorder.batches == [[0], [1, 3]]
    assert leaves.cancelled()
    await first


async def test_a_caller_who_leaves_while_its_batch_is_computed_harms_nobody(
    engine: Engine,
) -> None:
    recorder = Recorder()
    first = await held(engine, recorder)
    second = asyncio.ensure_future(engine.denoise("model", query(1)))
    first.cancel()
    await turns()
    recorder.go.set()
    assert values(await second) == [2]
    assert first.cancelled()


async def test_what_is_left_of_a_costly_query_is_not_computed_once_its_caller_left(
    engine: Engine,
) -> None:
    recorder = Recorder(MAX_BATCH_S)
    engine.add("model", recorder)
    recorder.go.clear()
    costly = asyncio.ensure_future(engine.denoise("model", query(1, 2, 3)))
    await recorder.until_entered()
    costly.cancel()
    await turns()
    recorder.go.set()
    assert values(await engine.denoise("model", query(9))) == [18]
    assert recorder.batches == [[1], [9]]


async def test_a_query_whose_deadline_passed_is_not_computed(engine: Engine) -> None:
    recorder = Recorder()
    first = await held(engine, recorder)
    late = asyncio.ensure_future(engine.denoise("model", query(1), time.monotonic() - 1))
    punctual = asyncio.ensure_future(engine.denoise("model", query(2), time.monotonic() + 60))
    await turns()
    recorder.go.set()
    assert values(await punctual) == [4]
    with pytest.raises(DeadlineExceededError, match="in the queue of model"):
        await late
    assert recorder.batches == [[0], [2]]
    await first


async def test_a_batch_that_fails_reaches_each_of_its_callers_and_the_next_one_works(
    engine: Engine,
) -> None:
    recorder = Recorder()
    recorder.fails_on = {2.0}
    first = await held(engine, recorder)
    batch = [asyncio.ensure_future(engine.denoise("model", query(i))) for i in (1, 2)]
    await turns()
    recorder.go.set()
    results = await asyncio.gather(*batch, return_exceptions=True)
    assert [type(result) for result in results] == [ZeroDivisionError, ZeroDivisionError]
    assert values(await engine.denoise("model", query(3))) == [6]
    await first


async def test_a_costly_query_of_which_a_part_fails_fails_once(engine: Engine) -> None:
    recorder = Recorder(MAX_BATCH_S)
    recorder.fails_on = {1.0, 2.0}
    engine.add("model", recorder)
    with pytest.raises(ZeroDivisionError):
        await engine.denoise("model", query(1, 2, 3))
    assert values(await engine.denoise("model", query(4))) == [8]


async def test_queries_that_cannot_be_put_together_fail_and_the_model_goes_on(
    engine: Engine,
) -> None:
    recorder = Recorder()
    first = await held(engine, recorder)
    odd = replace(query(1), pixels=np.zeros((1, 1, 5, 5), np.float32))
    batcher = engine._batchers["model"]
    clash = [asyncio.ensure_future(batcher.submit(one, math.inf)) for one in (odd, query(2))]
    await turns()
    recorder.go.set()
    results = await asyncio.gather(*clash, return_exceptions=True)
    assert [type(result) for result in results] == [ValueError, ValueError]
    assert values(await engine.denoise("model", query(3))) == [6]
    await first


async def test_small_work_runs_on_the_event_loop_and_other_work_does_not(engine: Engine) -> None:
    small, large = Recorder(1e-6), Recorder(1e-3)
    engine.add("small", small)
    engine.add("large", large)
    await engine.denoise("small", query(1))
    await engine.denoise("large", query(1))
    assert small.threads == [threading.get_ident()]
    assert large.threads != [threading.get_ident()]


async def test_small_work_joins_the_queue_while_its_model_is_busy(engine: Engine) -> None:
    recorder = Recorder()
    first = await held(engine, recorder)
    recorder.seconds = 1e-6
    small = asyncio.ensure_future(engine.denoise("model", query(1)))
    await turns()
    assert recorder.batches == [[0]]
    recorder.go.set()
    assert values(await small) == [2]
    await first


async def test_the_observer_is_told_of_every_item_and_batch(engine: Engine) -> None:
    observed, recorder = Observed(), Recorder()
    engine._observer = observed
    first = await held(engine, recorder)
    others = [asyncio.ensure_future(engine.denoise("model", query(i, i))) for i in (1, 2)]
    await turns()
    recorder.go.set()
    await asyncio.gather(first, *others)
    assert observed.images == [1, 4]
    assert len(observed.waits) == 3
    assert min(observed.waits) >= 0


async def test_a_query_that_does_not_fit_never_reaches_a_batch(engine: Engine) -> None:
    recorder = Recorder()
    engine.add("model", recorder)
    engine.loading = False
    with pytest.raises(InvalidArgumentError, match="x: expected shape"):
        await engine.denoise("model", replace(query(1), pixels=np.zeros((1, 1, 5, 5), np.float32)))
    with pytest.raises(NotFoundError, match="expected one of model, got 'other'"):
        await engine.denoise("other", query(1))
    assert recorder.batches == []


Act = tuple[str, int]
ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(1, 4)),
        st.tuples(st.just("leave"), st.integers(0, 9)),
        st.tuples(st.just("turn"), st.integers(1, 3)),
        st.tuples(st.just("late"), st.integers(1, 2)),
        st.tuples(st.just("fail"), st.integers(1, 2)),
    ),
    max_size=14,
)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(acts=ACTS, seconds=st.sampled_from([1e-6, 1e-3, MAX_BATCH_S / 2, MAX_BATCH_S * 3]))
async def test_every_caller_gets_its_own_rows_or_its_own_failure(
    acts: list[Act], seconds: float
) -> None:
    engine, recorder = Engine(Observed()), Recorder(seconds)
    engine.add("model", recorder)
    calls: list[tuple[str, list[float], asyncio.Task[object]]] = []
    number = 0.0
    try:
        for act, size in acts:
            if act == "turn":
                await turns(size)
            elif act == "leave":
                if size < len(calls):
                    calls[size][2].cancel()
            else:
                own = [number := number + 1 for _ in range(size)]
                if act == "fail":
                    recorder.fails_on.add(own[-1])
                deadline = -math.inf if act == "late" else math.inf
                call = asyncio.ensure_future(engine.denoise("model", query(*own), deadline))
                calls.append((act, own, call))
        done = await asyncio.wait_for(
            asyncio.gather(*(call for _, _, call in calls), return_exceptions=True), 30
        )
        for (_, own, _), result in zip(calls, done, strict=True):
            if isinstance(result, BaseException):
                allowed = (asyncio.CancelledError, DeadlineExceededError, ZeroDivisionError)
                assert isinstance(result, allowed), result
            else:
                # The list holds tasks of any kind, so a result is an object to mypy.
                assert values(result) == [2 * value for value in own]  # type: ignore[arg-type]
        last = await asyncio.wait_for(engine.denoise("model", query(-1)), 30)
        assert values(last) == [-2]
    finally:
        engine.close()
