"""Callers who leave, stall, hurry or come in crowds harm neither the server nor each other."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc
import numpy as np
import pytest
from tests.support.bad_requests import denoise, sample
from tests.support.processes import ServerProcess
from tests.support.refusals import TIMEOUT_S, assert_answers

from els_client import AsyncClient, Client, DeadlineExceededError, InvalidArgumentError
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceStub

ENDLESS: dict[str, Any] = {
    "model": "gaussian",
    "count": 64,
    "steps": 1000,
    "return_x": True,
    "return_denoised": True,
}
"""More than any buffer holds: whoever does not read makes the server wait."""


@pytest.fixture(autouse=True)
def _the_log_has_no_error(server: ServerProcess) -> Any:
    before = len(server.records())
    yield
    assert server.process.poll() is None
    records = server.records()[before:]
    assert [record for record in records if record["level"] in ("warning", "error")] == []


def test_a_client_that_cancels_an_unread_stream_affects_no_other(
    server: ServerProcess, channel: grpc.Channel
) -> None:
    for _ in range(5):
        with grpc.insecure_channel(server.target) as own:
            call: Any = DenoiserServiceStub(own).Sample(sample(**ENDLESS), timeout=TIMEOUT_S)
            next(call)
            call.cancel()
        assert_answers(channel)


def test_a_connection_that_breaks_mid_stream_affects_no_other(
    server: ServerProcess, channel: grpc.Channel
) -> None:
    for _ in range(5):
        with grpc.insecure_channel(server.target) as own:
            call: Any = DenoiserServiceStub(own).Sample(sample(**ENDLESS), timeout=TIMEOUT_S)
            next(call)
        assert_answers(channel)


async def test_slow_readers_do_not_slow_the_others_and_get_all_their_steps(
    server: ServerProcess,
) -> None:
    async with AsyncClient(server.target) as client:
        want: Any = {"model": "gaussian", "count": 32, "steps": 30}
        slow = [client.sample(seed=seed, **want) for seed in range(4)]
        for steps in slow:
            assert (await anext(steps)).index == 1
        for seed in range(4):
            indices = [step.index async for step in client.sample(seed=seed, **want)]
            assert indices == list(range(1, 31))
        for steps in slow:
            assert [step.index async for step in steps] == list(range(2, 31))


async def test_a_stream_that_is_left_half_way_leaves_the_next_one_whole(
    server: ServerProcess,
) -> None:
    async with AsyncClient(server.target) as client:
        options: Any = {"model": "zeros", "count": 4, "steps": 5, "seed": 2}
        whole = [step.x async for step in client.sample(**options)]
        for stop in range(1, 5):
            async for step in client.sample(**options):
                if step.index == stop:
                    break
        again = [step.x async for step in client.sample(**options)]
        np.testing.assert_array_equal(whole, again)


@pytest.mark.parametrize("timeout_s", [0.001, 0.01, 0.05])
def test_a_deadline_that_passes_in_the_queue_or_in_the_work_ends_the_call_alone(
    server: ServerProcess, channel: grpc.Channel, timeout_s: float
) -> None:
    with Client(server.target, timeout_s=timeout_s) as hasty:
        with pytest.raises(DeadlineExceededError):
            list(hasty.sample(model="zeros", count=256, steps=1000))
        large = np.zeros((256, 1, 6, 5), np.float32)
        with contextlib.suppress(DeadlineExceededError):
            hasty.denoise(large, model="zeros", sigma=1.0)
    assert_answers(channel)


async def test_two_hundred_callers_at_once_each_get_their_own_answer(
    server: ServerProcess,
) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 1, 6, 5)).astype(np.float32)
    sigma = rng.uniform(0.1, 5, 200)
    async with AsyncClient(server.target) as client:
        together = await client.denoise(x, model="zeros", sigma=sigma)
        answers = await asyncio.gather(
            *(client.denoise(x[i : i + 1], model="zeros", sigma=sigma[i]) for i in range(200))
        )
    assert np.concatenate(answers).tobytes() == together.tobytes()


async def test_a_crowd_that_mixes_good_bad_and_leaving_callers_sorts_itself(
    server: ServerProcess,
) -> None:
    x = np.random.default_rng(1).normal(size=(8, 1, 6, 5)).astype(np.float32)
    async with AsyncClient(server.target) as client:
        expected = await client.denoise(x, model="circular", sigma=0.5)

        async def good() -> np.ndarray:
            return await client.denoise(x, model="circular", sigma=0.5)

        async def bad() -> np.ndarray:
            return await client.denoise(x, model="circular", sigma=0.5, window=2)

        tasks = [asyncio.ensure_future(good() if i % 3 else bad()) for i in range(120)]
        leaving = [asyncio.ensure_future(good()) for _ in range(40)]
        await asyncio.wait(tasks[:1])
        for task in leaving:
            task.cancel()
        for i, result in enumerate(await asyncio.gather(*tasks, return_exceptions=True)):
            if i % 3:
                np.testing.assert_array_equal(result, expected)
            else:
                assert isinstance(result, InvalidArgumentError)
        await asyncio.wait(leaving)


def test_a_caller_who_hangs_up_at_once_is_no_error(
    server: ServerProcess, channel: grpc.Channel
) -> None:
    stub = DenoiserServiceStub(channel)
    calls = [stub.Denoise.future(denoise(), timeout=TIMEOUT_S) for _ in range(100)]
    for call in calls:
        call.cancel()
    assert_answers(channel)


def test_strange_metadata_are_no_error(channel: grpc.Channel) -> None:
    metadata = (
        ("x-request-id", "i" * 4000),
        ("x-request-id", ""),
        ("x-request-id-bin", b"\x00\xff"),
        ("traceparent", "nonsense"),
    )
    stub = DenoiserServiceStub(channel)
    assert stub.Denoise(denoise(), timeout=TIMEOUT_S, metadata=metadata).denoised.data
