"""Callers who leave cost the server no memory: what malloc has handed out is counted."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import random
import statistics
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import pairwise
from typing import Any

import grpc
import pytest
from tests.support.bad_requests import denoise, sample
from tests.support.metrics import metrics
from tests.support.processes import ServerProcess
from tests.support.refusals import TIMEOUT_S

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceStub

CALLERS, CALLS, WINDOWS = 4, 500, 3
BYTES = 64.0
"""Allowed for each call. The least that malloc gives to an operation of gRPC's is 96; before they
were freed, callers who left cost 110 to 330, of which cyclic garbage and threads' caches are 20."""


async def leaves(stub: Any) -> None:
    """Take one step of many and go."""
    call = stub.Sample(sample(model="wiener", steps=1000, count=2, return_x=True))
    await call.read()
    call.cancel()


async def hangs_up(stub: Any) -> None:
    """Ask, and be gone at any moment of it."""
    call = stub.Denoise(denoise(model="wiener"), timeout=TIMEOUT_S)
    # There is no event: the server may be anywhere.
    await asyncio.sleep(random.random() / 1000)
    call.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await call


async def leaves_its_stream(stub: Any) -> None:
    """Take one answer of a stream that is not at its end, and go."""

    async def requests() -> AsyncIterator[pb.DenoiseRequest]:
        for _ in range(3):
            yield denoise(model="wiener")
        await asyncio.Event().wait()

    call = stub.DenoiseStream(requests())
    await call.read()
    call.cancel()


# There is nothing to count with elsewhere.
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc")
@pytest.mark.parametrize("caller", [leaves, hangs_up, leaves_its_stream])
async def test_a_caller_who_leaves_costs_no_memory(
    server: ServerProcess, caller: Callable[[Any], Awaitable[None]]
) -> None:
    async def used_after_calls() -> float:
        async def one() -> None:
            for _ in range(CALLS // CALLERS):
                await caller(stub)

        await asyncio.gather(*(one() for _ in range(CALLERS)))
        while True:
            found = await asyncio.to_thread(metrics, server)
            begun, ended = (
                sum(count for _, count in found[f"grpc_server_{name}_total"])
                for name in ("started", "handled")
            )
            if begun == ended:
                return found["els_malloc_used_bytes"][0][1]

    async with grpc.aio.insecure_channel(server.target) as channel:
        stub = DenoiserServiceStub(channel)
        used = [await used_after_calls() for _ in range(1 + WINDOWS)]
        grown = [(after - before) / CALLS for before, after in pairwise(used)]
        assert statistics.median(grown) < BYTES, grown
