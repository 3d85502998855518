"""Callers who leave cost the server no memory: what malloc has handed out is counted."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from tests.e2e.bad_requests import denoise, sample
from tests.e2e.processes import ServerProcess
from tests.e2e.refusals import TIMEOUT_S
from tests.e2e.test_operations import metrics

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceStub

CALLERS = 4
CALLS = 1200
BYTES = 40.0
"""Allowed for each call: less than the least that malloc can give to one operation of gRPC's, 96
bytes. Callers who leave while one is under way leaked 120 to 330."""


async def leaves(stub: Any) -> None:
    """Take one step of many and go."""
    call = stub.Sample(sample(model="gaussian", steps=1000, count=32, return_x=True))
    await call.read()
    call.cancel()


async def hangs_up(stub: Any) -> None:
    """Ask, and be gone at any moment of it."""
    call = stub.Denoise(denoise(model="gaussian"), timeout=TIMEOUT_S)
    # There is no event: the server may be anywhere.
    await asyncio.sleep(random.random() / 500)
    call.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await call


async def leaves_its_stream(stub: Any) -> None:
    """Take one answer of a stream that is not at its end, and go."""

    async def requests() -> AsyncIterator[pb.DenoiseRequest]:
        for _ in range(3):
            yield denoise(model="gaussian")
        await asyncio.Event().wait()

    call = stub.DenoiseStream(requests())
    await call.read()
    call.cancel()


@pytest.mark.parametrize("caller", [leaves, hangs_up, leaves_its_stream])
async def test_a_caller_who_leaves_costs_no_memory(
    server: ServerProcess, caller: Callable[[Any], Awaitable[None]]
) -> None:
    async def rounds(count: int) -> float:
        async def one() -> None:
            for _ in range(count // CALLERS):
                await caller(stub)

        await asyncio.gather(*(one() for _ in range(CALLERS)))
        await stub.ListModels(pb.ListModelsRequest(), timeout=TIMEOUT_S)
        ((_, used),) = (await asyncio.to_thread(metrics, server)).get(
            "els_malloc_used_bytes", [({}, 0.0)]
        )
        return used

    async with grpc.aio.insecure_channel(server.target) as channel:
        stub = DenoiserServiceStub(channel)
        before = await rounds(CALLS)
        assert (await rounds(CALLS) - before) / CALLS < BYTES
