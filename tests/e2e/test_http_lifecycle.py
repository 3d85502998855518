"""Deadlines, disconnects, fairness, memory and drain at the HTTP port."""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path

import pytest
from tests.support.http_client import TIMEOUT_S, HttpClient, streamed
from tests.support.metrics import value
from tests.support.processes import FAULT_SERVER, ServerProcess, serving

LONG = {"steps": 1000, "count": 8, "return_x": True, "return_denoised": True}
SAMPLE = "/v1/models/slow:sample"
TENSOR = {"dtype": "DTYPE_F32", "shape": [1, 1, 6, 5], "data": "AAAA" * 40}
MAX_BYTES = 1 << 16


def starting(models: Path) -> AbstractContextManager[ServerProcess]:
    """Return a server with a model of 20 ms an image, small messages and little memory."""
    settings = {
        "ELS_QUEUE_S": "300",
        "ELS_DRAIN_S": "1",
        "ELS_RECEIVE_S": "0.5",
        "ELS_MAX_MESSAGE_BYTES": str(MAX_BYTES),
        "ELS_IN_FLIGHT_BYTES": str(4 * MAX_BYTES),
    }
    options = "--models", models, "--threads", 1, "--http-port", 0
    return serving(*options, program=FAULT_SERVER, **settings)


@pytest.fixture(scope="module")
def slow(models: Path) -> Iterator[ServerProcess]:
    with starting(models) as process:
        yield process


def until(is_so: Callable[[], bool]) -> None:
    """Wait for what another process does."""
    give_up = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert time.monotonic() < give_up


def in_flight(server: ServerProcess) -> float:
    return value(server, "els_calls_in_flight")


def test_deadlines_disconnects_and_slow_bodies_end_calls_and_free_what_they_held(
    slow: ServerProcess,
) -> None:
    port = slow.ready["http_port"]
    with HttpClient(port) as late:
        # Predicted to be late, and late while it computes.
        reply = late.post("/v1/models/slow:sample?steps=500", Request_Timeout="0.2")
        assert (reply.status, reply.json["code"]) == (504, "DEADLINE_EXCEEDED"), reply.json
        assert reply.json["error"].endswith("raise the call's deadline (Request-Timeout)")
        body = {"sigma": 1, "x": TENSOR, "timeout_s": 1e-9}
        reply = late.post("/v1/models/slow:denoise", body)
        assert reply.json["error"].endswith(
            "; 0 s are left of the time allowed: raise the call's deadline"
            " (Request-Timeout, timeout_s)"
        )
    for _ in range(3):
        with streamed(port, SAMPLE, LONG) as response:
            response.readline()
    with HttpClient(port) as gone:
        gone._connection.request("POST", SAMPLE, b'{"steps": 1000}')
        until(lambda: in_flight(slow) > 0)
    until(lambda: in_flight(slow) == 0)
    until(lambda: value(slow, "els_trajectories") == 0)
    dropped = value(slow, "grpc_server_handled_total", **labels("Sample", "Canceled"))
    assert dropped == 4
    head = b"POST /v2/models/slow/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999\r\n\r\n{"
    with closing(socket.create_connection(("127.0.0.1", port), TIMEOUT_S)) as connection:
        connection.sendall(head)
        with connection.makefile("rb") as received:
            answer = received.read()
        assert answer.startswith(b"HTTP/1.1 504")
        assert b"did not arrive within 0.5 s" in answer
    until(lambda: value(slow, "els_memory_in_flight_bytes") == 0)
    assert [one for one in slow.records() if one["level"] in ("warning", "error")] == []


def labels(method: str, code: str) -> dict[str, str]:
    return {
        "grpc_type": "server_stream",
        "grpc_service": "denoise.v1.DenoiserService",
        "grpc_method": method,
        "grpc_code": code,
    }


def test_bodies_beyond_the_limits_are_413_and_full_memory_is_429_with_a_time_to_retry(
    slow: ServerProcess,
) -> None:
    port = slow.ready["http_port"]
    with HttpClient(port) as http:
        reply = http.post("/v2/models/slow/infer", bytes(MAX_BYTES + 1))
        assert (reply.status, reply.json["field"]) == (413, "body")
    with HttpClient(port) as http:
        parts = iter([b"x" * 1000] * 100)
        path = "/v2/models/slow/infer"
        http._connection.request("POST", path, parts, encode_chunked=True)
        assert http._connection.getresponse().status == 413
    # A trajectory holds more than half of the memory: another of that size does not fit.
    large = {"steps": 1000, "count": 256}
    with streamed(port, SAMPLE, {**large, "return_x": True}) as first, HttpClient(port) as other:
        first.readline()
        reply = other.post(SAMPLE, large)
        assert (reply.status, reply.json["code"]) == (429, "RESOURCE_EXHAUSTED"), reply.json
        assert int(reply.headers["retry-after"]) >= 1


def test_responses_that_are_not_read_stay_in_the_budget(
    server: ServerProcess, http: HttpClient
) -> None:
    shape = [256, 3, 32, 32]
    tensor = {"dtype": "DTYPE_F16", "shape": shape, "data": "AAAA" * (math.prod(shape) * 2 // 3)}
    body = json.dumps({"sigma": 1, "x": tensor}).encode()
    head = b"POST /v1/models/gaussian:denoise HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
    with closing(socket.socket()) as lazy:
        # Else the buffers of the system would take the response.
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.settimeout(TIMEOUT_S)
        lazy.connect(("127.0.0.1", http.port))
        lazy.sendall(head + b"%d\r\n\r\n" % len(body) + body)
        assert lazy.recv(15) == b"HTTP/1.1 200 OK"
        held = value(server, "els_memory_in_flight_bytes")
        assert held >= math.prod(shape) * 4
        assert value(server, "els_memory_in_flight_bytes") == held
    until(lambda: value(server, "els_memory_in_flight_bytes") < held)


def test_a_drain_ends_streams_with_a_resume_token_and_exits(models: Path) -> None:
    with starting(models) as server:
        port = server.ready["http_port"]
        body = {"steps": 1000, "return_x": True, "encoding": "png"}
        with streamed(port, SAMPLE, body) as response, HttpClient(port) as kept:
            assert kept.get("/v2/health/ready").status == 200
            response.readline()
            server.terminate()
            *_, token, error = response.read().splitlines()
        assert b'"resume_token":"' in token
        assert b'"resume_token":""' not in token
        assert b'"code":"UNAVAILABLE"' in error
        assert server.wait()[0] == 0
        with pytest.raises(ConnectionRefusedError):
            HttpClient(port).get("/v2/health/live")
