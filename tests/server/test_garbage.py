"""Memory of a call is freed when the call ends, without the garbage collector."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from tests.support.messages import asked, denoiser
from tests.support.models_folder import DOCUMENTS, write_models

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.config import Settings
from els_service.denoisers.base import Denoised, Query
from els_service.server.server import Server
from els_service.server.services.streams import Window
from els_service.server.transport.call_context import check_cancelled

LARGE = np.zeros((64, 3, 32, 32), np.float32)
"""More than is computed on the event loop."""


@pytest.fixture
async def stub(tmp_path: Path) -> AsyncIterator[Any]:
    """Yield a stub of a server in this process."""
    root = write_models(tmp_path / "models", {"gaussian": DOCUMENTS["gaussian"]})
    settings = Settings(models=root, port=0, metrics_port=0, device="cpu", drain_s=1, grace_s=0)
    server = Server(settings)
    try:
        ports = await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{ports.grpc_port}") as channel:
            yield denoiser(channel)
        await server.drain()
    finally:
        await server.close()


def question(**changes: Any) -> pb.DenoiseRequest:
    return asked(LARGE, **{"model": "gaussian", **changes})


async def answered(stub: Any) -> None:
    await stub.Denoise(question())


async def refused(stub: Any) -> None:
    with suppress(grpc.aio.AioRpcError):
        await stub.Denoise(question(windows=[3]))


async def left(stub: Any) -> None:
    call = stub.Denoise(question())
    await call.wait_for_connection()
    call.cancel()
    with suppress(asyncio.CancelledError):
        await call


async def drawn(stub: Any) -> None:
    async for _ in stub.Sample(pb.SampleRequest(model="gaussian", count=8, steps=3)):
        pass


async def drawing_left(stub: Any) -> None:
    call = stub.Sample(pb.SampleRequest(model="gaussian", count=8, steps=1000, return_x=True))
    await call.read()
    call.cancel()


async def streamed(stub: Any) -> None:
    call = stub.DenoiseStream()
    for request in (question(), question(windows=[3]), question(model="nobody")):
        await call.write(request)
        await call.read()
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF


async def stream_left(stub: Any) -> None:
    call = stub.DenoiseStream()
    for _ in range(3):
        await call.write(question())
    await call.read()
    call.cancel()


def contents() -> list[str]:
    """Return the unreachable objects that hold pixels, or a stream's requests under way."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    gc.set_debug(0)
    found = [
        type(one).__name__
        for one in gc.garbage
        if isinstance(one, Message | Query | Denoised | Window)
    ]
    gc.garbage.clear()
    return [name for name in found if name != "Status"]


@pytest.mark.alone
@pytest.mark.parametrize(
    "ask", [answered, refused, left, drawn, drawing_left, streamed, stream_left]
)
async def test_a_call_that_ended_leaves_no_pixels_to_the_collector(
    stub: Any, ask: Callable[[Any], Awaitable[None]]
) -> None:
    await ask(stub)  # fills caches
    gc.collect()
    gc.disable()
    try:
        await ask(stub)
        # What the latest call held may be held until the next.
        await stub.ListModels(pb.ListModelsRequest())
        # The server's end of a call that was left comes later: there is no event to wait for.
        for _ in range(20):
            await asyncio.sleep(0.01)
        assert contents() == []
    finally:
        gc.enable()


async def test_a_cancelled_task_is_freed_without_the_collector() -> None:
    async def reads() -> None:
        with suppress(asyncio.CancelledError):  # as grpc does in a read
            await asyncio.Event().wait()
        check_cancelled()

    gc.disable()
    try:
        task = asyncio.ensure_future(reads())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        reference = weakref.ref(task)
        del task
        assert reference() is None
    finally:
        gc.enable()
