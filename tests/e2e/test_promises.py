"""Promises over gRPC: full queues, deadlines, priorities and fair shares, on a slow model.

The model sleeps: how busy the machine is changes little of what is measured.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tests.support.fault_server import IMAGE_S
from tests.support.messages import array, asked, denoiser, images
from tests.support.processes import ServerProcess
from tests.support.refusals import TIMEOUT_S

pytestmark = pytest.mark.alone


@pytest.fixture
async def aio(fault_server: ServerProcess) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(fault_server.target) as channel:
        for i in range(4):  # by now what an image takes is known
            await ask(channel, i)
        yield channel


async def ask(channel: grpc.aio.Channel, value: float, **changes: Any) -> float:
    """Return the latency of one right answer, in seconds."""
    clock = asyncio.get_running_loop().time
    began = clock()
    response = await denoiser(channel).Denoise(asked(images(value), **changes), timeout=TIMEOUT_S)
    assert np.array_equal(array(response.denoised), images(2 * value))
    return clock() - began


def retry_after_s(error: grpc.aio.AioRpcError) -> float:
    """Return the one detail of a status, which is when to come again."""
    as_call: Any = error
    status = rpc_status.from_call(as_call)
    (detail,) = status.details
    retry = error_details_pb2.RetryInfo()
    assert detail.Unpack(retry)
    return float(retry.retry_delay.ToTimedelta().total_seconds())


async def test_a_full_queue_returns_a_retry_delay_and_completes_all_admitted_requests(
    aio: grpc.aio.Channel,
) -> None:
    calls = [asyncio.ensure_future(ask(aio, i)) for i in range(150)]  # 3 s of work, 2 s allowed
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
    taken = [outcome for outcome in outcomes if isinstance(outcome, float)]
    assert len(refused) + len(taken) == 150
    assert len(refused) > 20
    assert len(taken) > 60
    for error in refused:
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "the queue of slow is full" in str(error.details())
        assert 0.05 <= retry_after_s(error) < 5
    await ask(aio, 1)


async def test_an_answer_predicted_late_is_refused_at_once_with_the_prediction(
    aio: grpc.aio.Channel,
) -> None:
    waiting = [asyncio.ensure_future(ask(aio, i)) for i in range(60)]
    await waiting[0]  # of 1.2 s most is left
    clock = asyncio.get_running_loop().time
    for by_field in (True, False):
        request = asked(images(7), timeout_s=0.5 if by_field else 0)
        began = clock()
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await denoiser(aio).Denoise(request, timeout=TIMEOUT_S if by_field else 0.5)
        assert clock() - began < 0.25
        assert refusal.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "the answer of slow is predicted in" in str(refusal.value.details())
        assert retry_after_s(refusal.value) > 0
    await ask(aio, 8, timeout_s=5.0)
    await asyncio.gather(*waiting)


async def test_a_request_whose_deadline_passes_in_the_queue_fails_in_time_and_is_not_computed(
    aio: grpc.aio.Channel,
) -> None:
    slow = [asyncio.ensure_future(ask(aio, i)) for i in range(5)]
    await slow[0]
    # Predicted in 0.1 s, while the others are computed; then more urgent work comes before it.
    late = asyncio.ensure_future(ask(aio, 1, priority=3, timeout_s=0.25))
    urgent = [asyncio.ensure_future(ask(aio, i, priority=1)) for i in range(40)]
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await late
    assert refusal.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "in the queue of slow" in str(refusal.value.details())
    await asyncio.gather(*slow, *urgent)


async def test_the_urgent_is_answered_first(aio: grpc.aio.Channel) -> None:
    patient = [asyncio.ensure_future(ask(aio, i, priority=3)) for i in range(60)]
    await patient[0]
    await ask(aio, 5, priority=1)
    assert sum(call.done() for call in patient) < 40
    await asyncio.gather(*patient)


async def test_the_patient_do_not_starve(aio: grpc.aio.Channel) -> None:
    done = asyncio.Event()

    async def flood() -> None:
        while not done.is_set():
            await ask(aio, 3, priority=1)

    floods = [asyncio.ensure_future(flood()) for _ in range(40)]  # more than a batch holds
    await asyncio.sleep(0.1)
    assert await ask(aio, 5, priority=3) < 2  # the starvation bound is 0.3 s, a batch 0.25 s
    done.set()
    await asyncio.gather(*floods)


async def test_a_flood_of_one_caller_does_not_slow_another_down_twice(
    fault_server: ServerProcess, aio: grpc.aio.Channel
) -> None:
    # Otherwise both channels would share a connection, and be one caller.
    own_connection = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(fault_server.target, own_connection) as other:
        fair = await latencies_beside(aio, other, flood=4)
        flooded = await latencies_beside(aio, other, flood=40)
    # p99 of a few hundred calls is their worst; a busy machine adds a batch to it now and then.
    assert np.quantile(flooded, 0.9) < 2 * np.quantile(fair, 0.9) + 2 * IMAGE_S
    assert max(flooded) < 3 * max(fair)


async def latencies_beside(
    quiet: grpc.aio.Channel, loud: grpc.aio.Channel, flood: int
) -> list[float]:
    """Return the latencies of a caller of four calls at a time beside one of ``flood``."""
    done = asyncio.Event()

    async def ask_on() -> None:
        while not done.is_set():
            await ask(loud, 3)

    async def ask_often() -> list[float]:
        return [await ask(quiet, 4) for _ in range(10)]

    floods = [asyncio.ensure_future(ask_on()) for _ in range(flood)]
    latencies = await asyncio.gather(*(ask_often() for _ in range(4)))
    done.set()
    await asyncio.gather(*floods)
    return [latency for each in latencies for latency in each]
