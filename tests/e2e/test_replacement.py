"""Servers are replaced under load, drained or killed, and a client that retries loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
from tests.support.messages import images, images_computed
from tests.support.processes import FAULT_SERVER, ServerProcess

from els_client import AsyncClient

CALLERS = 16
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SETTINGS, _GOAWAY = 4, 7


class Pair:
    """Two servers of slow models, each of which can be ended and started again on its port."""

    def __init__(self, models: Path, logs: Path) -> None:
        self._models, self._logs = models, logs
        self._started = 0
        self.servers = [self._start(0), self._start(0)]
        self.target = "ipv4:" + ",".join(server.target for server in self.servers)

    def _start(self, port: int) -> ServerProcess:
        self._started += 1
        log = self._logs / str(self._started)
        options = ("--models", self._models, "--threads", 1, f"--port={port}")
        return ServerProcess(log, *options, program=FAULT_SERVER, ELS_GRACE_S="0.2")

    async def replace(self, which: int, number: signal.Signals) -> int:
        """End a server by a signal, start it again; return the exit code of the old one."""
        old = self.servers[which]
        old.process.send_signal(number)
        code, rest = await asyncio.to_thread(old.wait)
        assert rest == ""
        port = old.ready["grpc_port"]
        self.servers[which] = await asyncio.to_thread(self._start, port)
        return code

    async def is_asked(self, which: int) -> None:
        """Wait until a server has computed something."""
        async with grpc.aio.insecure_channel(self.servers[which].target) as channel:
            while not await images_computed(channel, "slow"):
                await asyncio.sleep(0.05)

    def close(self) -> None:
        for server in self.servers:
            server.kill()


@contextlib.asynccontextmanager
async def load(target: str) -> AsyncIterator[list[int]]:
    """Yield the counts of callers in a closed loop; each answer must come, and be right."""
    done = asyncio.Event()
    counts = [0] * CALLERS

    async def caller(number: int) -> None:
        async with contextlib.AsyncExitStack() as stack:
            # Half of them have connections of their own.
            client = own if number % 2 else await stack.enter_async_context(AsyncClient(target))
            while not done.is_set():
                x = images(number, counts[number])
                answer = await client.denoise(x, model="slow", sigma=1.0)
                assert np.array_equal(answer, 2 * x)
                counts[number] += 1

    async with AsyncClient(target) as own:
        callers = [asyncio.ensure_future(caller(i)) for i in range(CALLERS)]
        yield counts
        done.set()
        await asyncio.gather(*callers)


async def goaway(server: ServerProcess) -> bool:
    """Return whether a bare connection is sent GOAWAY before it is closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.ready["grpc_port"])
    writer.write(_PREFACE + bytes([0, 0, 0, _SETTINGS, 0, 0, 0, 0, 0]))
    kinds = set()
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = await reader.readexactly(9)
            kinds.add(head[3])
            await reader.readexactly(int.from_bytes(head[:3]))
    writer.close()
    return _GOAWAY in kinds


async def test_servers_are_drained_and_killed_under_load_and_no_call_fails(
    models: Path, tmp_path: Path
) -> None:
    pair = await asyncio.to_thread(Pair, models, tmp_path)
    try:
        async with load(pair.target) as counts:
            for which in (0, 1, 0):
                before = min(counts)
                seen = asyncio.ensure_future(goaway(pair.servers[which]))
                assert await pair.replace(which, signal.SIGTERM) == 0
                assert await seen
                await pair.is_asked(which)
                assert min(counts) > before
            assert await pair.replace(1, signal.SIGKILL) == -signal.SIGKILL
            await pair.is_asked(1)
    finally:
        await asyncio.to_thread(pair.close)
