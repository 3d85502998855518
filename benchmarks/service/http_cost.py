"""``ModelInfer`` over HTTP with binary tensors, compared with gRPC unary in alternating rounds."""

from __future__ import annotations

import asyncio
import json
import time
from functools import partial
from typing import Any

import numpy as np
import uvloop

from benchmarks.service import load, messages
from benchmarks.service.messages import EXPECTED, MODEL, MODEL_INFER, SHAPE, SIGMA, X
from benchmarks.service.overhead import Target, ratio_row, summary
from benchmarks.service.servers import els_server_with_http

GOAL = 0.5
"""Minimum ratio of calls per second."""
_START_S = 90.0
_END, _LENGTH = b"\r\n\r\n", b"\r\ncontent-length: "


def request_of(port: int) -> bytes:
    """Return the request of a 12 KB image: the same numbers as ``MODEL_INFER``."""
    head = json.dumps(
        {
            "inputs": [
                _described("x", SHAPE, X.nbytes),
                _described("sigma", (1, 1), 4),
            ],
            "outputs": [{"name": "denoised", "parameters": {"binary_data": True}}],
        }
    ).encode()
    body = head + X.tobytes() + np.full((1, 1), SIGMA, "<f4").tobytes()
    lines = (
        f"POST /v2/models/{MODEL}/infer HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        f"Inference-Header-Content-Length: {len(head)}",
        f"Content-Length: {len(body)}",
    )
    return "\r\n".join(lines).encode() + _END + body


def measure(*, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Return a row for each transport, and their ratio.

    Args:
        rounds: number of rounds, every other one in reverse order.
        seconds: duration of a transport in a round.
    """
    with (
        els_server_with_http() as (server, http_port),
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        grpc_infer = Target("infer", server, MODEL_INFER)
        http_infer = Target("http_infer", server, MODEL_INFER)
        answer = runner.run(load.first_answer(server.port, MODEL_INFER, _START_S))
        messages.check(MODEL_INFER, answer, bare=False)
        request = request_of(http_port)
        check(runner.run(_once(http_port, request)))

        async def over_grpc() -> float:
            return await load.unary(server.port, MODEL_INFER, seconds)

        async def over_http() -> float:
            return await closed_loop(http_port, request, seconds)

        pairs = [(grpc_infer, over_grpc), (http_infer, over_http)]
        for number in range(rounds):
            for target, ask in pairs if number % 2 == 0 else pairs[::-1]:
                before = server.cpu_seconds()
                rate = runner.run(ask())
                target.rates.append(rate)
                target.cpu_us.append(1e6 * (server.cpu_seconds() - before) / (rate * seconds))
    rows = [summary(grpc_infer, seconds), summary(http_infer, seconds)]
    return [*rows, ratio_row(http_infer, grpc_infer, GOAL)]


def check(response: bytes) -> None:
    """Check a response: wrong results are not timed.

    Raises:
        ValueError: It is another image.
    """
    got = np.frombuffer(response[-X.nbytes :], "u1")
    expected = EXPECTED.astype("<f4")
    is_right = response.startswith(b"HTTP/1.1 200") and len(got) == X.nbytes
    if not is_right or not np.allclose(got.view("<f4").reshape(SHAPE), expected):
        raise ValueError(f"a wrong answer, expected the denoised image: {response[:500]!r}")


async def closed_loop(port: int, request: bytes, seconds: float) -> float:
    """Return the requests per second of ``CALLERS`` connections, each with one in flight."""
    start = time.perf_counter()
    loop = asyncio.get_running_loop()
    callers = [_Caller(request, start + seconds) for _ in range(load.CALLERS)]
    for caller in callers:
        await loop.create_connection(partial(_same, caller), "127.0.0.1", port)
    calls = sum([await caller.done for caller in callers])
    return calls / (time.perf_counter() - start)


def _same(caller: _Caller) -> _Caller:
    return caller


class _Caller(asyncio.Protocol):
    """One connection, which sends the next request when a response is complete."""

    def __init__(self, request: bytes, end: float) -> None:
        self._request, self._end = request, end
        self._received, self._expected, self._calls = b"", 0, 0
        self.done: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        """Send the first request."""
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Count a complete response, and send the next request."""
        self._received += data
        if not self._expected and _END in self._received:
            head, _, _ = self._received.partition(_END)
            if not head.startswith(b"HTTP/1.1 200"):
                self.done.set_exception(ValueError(self._received[:300]))
                return
            length = int(head.partition(_LENGTH)[2].partition(b"\r\n")[0])
            self._expected = len(head) + len(_END) + length
        if self._expected and len(self._received) >= self._expected:
            self._received, self._expected = b"", 0
            self._calls += 1
            if time.perf_counter() < self._end:
                self._transport.write(self._request)
            else:
                self._transport.close()
                self.done.set_result(self._calls)


async def _once(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    head = await reader.readuntil(_END)
    length = int(head.partition(_LENGTH)[2].partition(b"\r\n")[0])
    body = await reader.readexactly(length)
    writer.close()
    return head + body


def _described(name: str, shape: tuple[int, ...], size: int) -> dict[str, Any]:
    parameters = {"binary_data_size": size}
    return {"name": name, "datatype": "FP32", "shape": shape, "parameters": parameters}
