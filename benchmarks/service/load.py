"""Closed-loop callers over one raw stub, the same for every server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable
from typing import Any

import grpc

from benchmarks.service.messages import Method

CALLERS = 16
CALL_S = 10.0
"""Timeout of a call; one that exceeds it ends the benchmark."""
Raw = Any
"""A multi-callable of bytes, which gRPC's stubs cannot express."""


async def unary(port: int, method: Method, seconds: float) -> float:
    """Return the calls per second of ``CALLERS`` callers, each with one call in flight."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call: Raw = channel.unary_unary(method.name)
        await call(method.message(), timeout=CALL_S)
        end = time.perf_counter() + seconds

        async def caller() -> int:
            calls = 0
            while time.perf_counter() < end:
                await call(method.message(), timeout=CALL_S)
                calls += 1
            return calls

        return await _rate(caller() for _ in range(CALLERS))


async def stream(port: int, method: Method, seconds: float) -> float:
    """Return the messages per second over one stream, ``CALLERS`` of them in flight."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call: Raw = channel.stream_stream(method.name)(timeout=seconds + CALL_S)
        end = time.perf_counter() + seconds
        free = asyncio.Semaphore(CALLERS)

        async def write() -> int:
            while time.perf_counter() < end:
                await free.acquire()
                await call.write(method.message())
            await call.done_writing()
            return 0

        async def read() -> int:
            answers = 0
            while await call.read() is not grpc.aio.EOF:
                free.release()
                answers += 1
            return answers

        return await _rate((write(), read()))


async def first_answer(port: int, method: Method, within_s: float) -> bytes:
    """Return the first response of a server that is starting.

    Raises:
        grpc.aio.AioRpcError: There was none within ``within_s``.
    """
    deadline = time.monotonic() + within_s
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call: Raw = channel.unary_unary(method.name)
        while True:
            try:
                answer: bytes = await call(method.body, timeout=CALL_S, wait_for_ready=True)
            except grpc.aio.AioRpcError:
                # It listens, but has not loaded the model.
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.2)
            else:
                return answer


async def first_streamed(port: int, method: Method, within_s: float) -> bytes:
    """Return the first response on a stream of a server that is ready."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call: Raw = channel.stream_stream(method.name)(timeout=within_s)
        await call.write(method.body)
        answer: bytes = await call.read()
        await call.done_writing()
        return answer


async def _rate(callers: Iterable[Coroutine[Any, Any, int]]) -> float:
    start = time.perf_counter()
    done: int = sum(await asyncio.gather(*callers))
    return done / (time.perf_counter() - start)
