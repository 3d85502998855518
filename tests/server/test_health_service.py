"""The health service at a real server in this process, and peers that take no answers."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import socket
import statistics
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub, add_HealthServicer_to_server
from tests.support import frames
from tests.support.refusals import TIMEOUT_S
from tests.support.stalling import stalled

from els_service.engine.budget import Budget
from els_service.server.services import health as health_service
from els_service.server.services.health import WRITES_OF_PEER, HealthService
from els_service.server.services.health_watchers import Watchers
from els_service.server.telemetry import process
from els_service.server.transport.grpc_workarounds import make_server
from els_service.server.transport.receiving import Receiver
from els_service.server.transport.small_messages import SMALL_MESSAGE_BYTES, SmallMessages

SERVING, NOT_SERVING = 1, 2
LIST = vars(health_pb2)["HealthListRequest"]()
"""Of a type that the stubs do not know."""
MESSAGE = b"\0\0\0\0\x02\x08"
"""What comes before a status."""
DEADLINE_EXCEEDED = b"\x0bgrpc-status\x014"
CONNECTIONS, WATCHES, WINDOWS = 8, 125, 3
BYTES = 64.0
"""Allowed for each dropped watcher; while its call lasts it takes 19 KB."""


@dataclass
class Served:
    """A health service, its port, and what it tells."""

    port: int = 0
    statuses: dict[str, int] = field(default_factory=lambda: {"": SERVING})
    watchers: Watchers = field(default_factory=lambda: Watchers(10_000, 10_000))

    def set(self, service: str, status: int) -> None:
        self.statuses[service] = status
        self.watchers.wake(service)


@pytest.fixture
async def served(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    """A service that drops watchers soon."""
    monkeypatch.setattr(health_service, "_TAKEN_WITHIN_S", 0.1)
    served = Served()
    server = make_server([])
    small: Any = SmallMessages(server, Receiver(Budget(1 << 30), 1 << 26, 60.0))
    add_HealthServicer_to_server(HealthService(served.statuses, served.watchers), small)
    served.port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield served
    await server.stop(None)


async def until(holds: Callable[[], bool]) -> None:
    """Wait until the service has seen what its peers did."""
    async with asyncio.timeout(TIMEOUT_S):
        while not holds():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def stalling(port: int, watches: int, connections: int) -> AsyncIterator[list[socket.socket]]:
    """Yield connections that watch the overall health and take no answer."""
    with ExitStack() as stack:
        peers = stalled(port, [""] * watches, connections)
        yield await asyncio.to_thread(stack.enter_context, peers)


@pytest.fixture
async def stub(served: Served) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{served.port}") as channel:
        yield HealthStub(channel)


def request(service: str = "") -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=service)


def is_end(frame: tuple[int, int, bytes]) -> bool:
    """Return whether a frame ends a call."""
    kind, flags, _ = frame
    return kind == frames.HEADERS and bool(flags & frames.END_STREAM)


def everything(peer: socket.socket) -> bytes:
    """Make room for answers; return headers and data until the call has ended."""
    window = struct.pack(">HI", frames.INITIAL_WINDOW_SIZE, 1000)
    peer.sendall(frames.frame(frames.SETTINGS, payload=window))
    found = b""
    for frame in frames.received(peer):
        found += frame[2] if frame[0] in (frames.DATA, frames.HEADERS) else b""
        if is_end(frame):
            return found
    raise AssertionError("the connection was closed")


async def test_a_watcher_that_reads_nothing_is_dropped_and_its_call_ends_once_it_reads(
    served: Served,
) -> None:
    watchers = served.watchers
    async with stalling(served.port, 1, 1) as (peer,):
        await until(lambda: (watchers.live, watchers.stalled) == (0, 1))
        served.set("", NOT_SERVING)
        found = await asyncio.to_thread(everything, peer)
        # The answer that was on its way, none after it, and why.
        assert found.count(MESSAGE) == 1
        assert MESSAGE + bytes([SERVING]) in found
        assert DEADLINE_EXCEEDED in found
        assert b"watchers: expected each response to be read within 5 s" in found
        await until(lambda: watchers.stalled == 0)


async def test_few_dropped_watchers_of_a_connection_keep_their_calls(served: Served) -> None:
    watchers = served.watchers

    def await_ends(peer: socket.socket, count: int) -> None:
        for one in frames.received(peer):
            count -= is_end(one)
            if not count:
                return
        raise AssertionError("the connection was closed")

    async with stalling(served.port, 20, 1) as (peer,):
        await asyncio.to_thread(await_ends, peer, 20 - WRITES_OF_PEER)
        await until(lambda: (watchers.live, watchers.stalled) == (0, WRITES_OF_PEER))
    await until(lambda: watchers.stalled == 0)


# There is nothing to count with elsewhere.
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc")
async def test_dropped_watchers_leave_no_memory_behind(served: Served) -> None:
    watchers, dropped = served.watchers, CONNECTIONS * WATCHES
    unended = CONNECTIONS * WRITES_OF_PEER

    async def used_after_drops() -> float:
        async with stalling(served.port, WATCHES, CONNECTIONS):
            await until(lambda: (watchers.live, watchers.stalled) == (0, unended))
        await until(lambda: watchers.stalled == 0)
        gc.collect()
        return dict(process.heap_sizes())["els_malloc_used_bytes"]

    used = [await used_after_drops() for _ in range(1 + WINDOWS)]
    grown = [(after - before) / dropped for before, after in pairwise(used)]
    assert statistics.median(grown) < BYTES, grown


async def test_a_watcher_is_sent_the_latest_status_only(served: Served, stub: Any) -> None:
    call = stub.Watch(request(), timeout=TIMEOUT_S)
    assert (await call.read()).status == SERVING
    for status in (NOT_SERVING, SERVING, NOT_SERVING):
        served.set("", status)
    assert (await call.read()).status == NOT_SERVING
    served.set("", SERVING)
    assert (await call.read()).status == SERVING
    call.cancel()
    await until(lambda: served.watchers.live == 0)


async def test_no_watch_holds_on_to_a_request_larger_than_any_name(
    served: Served, stub: Any
) -> None:
    call = stub.Watch(request("x" * SMALL_MESSAGE_BYTES), timeout=TIMEOUT_S)
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert await call.details() == "request: expected a message of at most 4096 bytes"
    assert served.watchers.live == 0


async def test_more_services_than_one_answer_may_list_are_refused(
    served: Served, stub: Any
) -> None:
    served.statuses.update({f"model-{i}": SERVING for i in range(1000)})
    call = stub.List(LIST, timeout=TIMEOUT_S)
    assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await call.details() == "services: expected at most 1000 to list, got 1001"
