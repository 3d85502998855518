"""Connections that no gRPC library would make, and very many: none harms the server or others."""

from __future__ import annotations

import random
import resource
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest
from tests.support import frames
from tests.support.processes import ServerProcess, serving
from tests.support.refusals import TIMEOUT_S, assert_answers

PATIENCE_S = 0.5
CROWD = 1000
_RST = struct.pack("ii", 1, 0)


def client_hello() -> bytes:
    """Return how a TLS connection begins."""
    out = ssl.MemoryBIO()
    wrapped = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), out, server_hostname="x")
    with pytest.raises(ssl.SSLWantReadError):
        wrapped.do_handshake()
    return out.read()


def call(path: str, stream: int, message: bytes = b"\0" * 5) -> bytes:
    """Return the frames of a unary call; the message is empty, in gRPC's own envelope."""
    return frames.frame(
        frames.HEADERS, flags=frames.END_HEADERS, stream=stream, payload=frames.headers(path)
    ) + frames.frame(frames.DATA, flags=frames.END_STREAM, stream=stream, payload=message)


def opened(stream: int, flags: int = frames.END_HEADERS) -> bytes:
    """Return the headers of a call that has more to say."""
    block = frames.headers(HEALTH)
    return frames.frame(frames.HEADERS, flags=flags, stream=stream, payload=block)


HEALTH = "/grpc.health.v1.Health/Check"
LIST = "/denoise.v1.DenoiserService/ListModels"
NOISE = random.Random(0).randbytes(8192)
BEGIN = frames.BEGINNING

ATTACKS = {
    "nothing": b"",
    "noise": NOISE,
    "HTTP/1": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "TLS to a port without": client_hello(),
    "half a preface": frames.PREFACE[:11],
    "a preface, then silence": frames.PREFACE,
    "settings, then silence": BEGIN,
    "noise after the preface": BEGIN + NOISE,
    "half a frame": BEGIN + frames.frame(frames.HEADERS, stream=1, payload=bytes(100))[:30],
    "a frame of 16 MiB": BEGIN + b"\xff\xff\xff" + frames.frame(frames.DATA, stream=1)[3:] + NOISE,
    "data of no stream": BEGIN + frames.frame(frames.DATA, payload=b"x"),
    "a stream of the server's": BEGIN + call(HEALTH, 2),
    "headers that are noise": BEGIN
    + frames.frame(frames.HEADERS, flags=frames.END_HEADERS, stream=1, payload=NOISE[:200]),
    "headers that never end": BEGIN
    + opened(1, flags=0)
    + 500 * frames.frame(frames.CONTINUATION, stream=1, payload=b"\x10\x01a\x7f\x10" + b"b" * 143),
    "a message cut short": BEGIN + call(HEALTH, 1, b"\0\0\0\0\x64" + b"x" * 10),
    "a message of 4 GiB": BEGIN
    + opened(1)
    + frames.frame(frames.DATA, stream=1, payload=b"\0" + b"\xff" * 9),
    "a call without an end": BEGIN
    + opened(1)
    + frames.frame(frames.DATA, stream=1, payload=bytes(3)),
    "calls begun and reset": BEGIN
    + b"".join(
        opened(stream) + frames.frame(frames.RST_STREAM, stream=stream, payload=b"\0\0\0\x08")
        for stream in range(1, 1001, 2)
    ),
    "settings without an end": BEGIN + 2000 * frames.frame(frames.SETTINGS),
    "pings without an end": BEGIN + 2000 * frames.frame(frames.PING, payload=bytes(8)),
}


@contextmanager
def soft_limit(files: int) -> Iterator[None]:
    """Let this process, and those that it starts, open so many files."""
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(files, most), most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, most))


@pytest.fixture(scope="module")
def besieged(models: Path) -> Iterator[ServerProcess]:
    """A server of little patience."""
    settings = {
        "ELS_HANDSHAKE_S": str(PATIENCE_S),
        "ELS_KEEPALIVE_S": str(PATIENCE_S),
        "ELS_KEEPALIVE_TIMEOUT_S": str(PATIENCE_S),
    }
    with serving("--models", models, "--threads", 1, **settings) as process:
        yield process


@pytest.fixture(scope="module")
def port(besieged: ServerProcess) -> int:
    return int(besieged.ready["grpc_port"])


@pytest.fixture(scope="module")
def other(besieged: ServerProcess) -> Iterator[grpc.Channel]:
    """Somebody who means well."""
    with grpc.insecure_channel(besieged.target) as channel:
        assert_answers(channel)
        yield channel


@pytest.fixture(scope="module")
def files(besieged: ServerProcess, port: int, other: grpc.Channel) -> int:
    """How many files the server has open while nobody but ``other`` is there."""
    with frames.connected(port, BEGIN + call(LIST, 1)) as peer:
        answer(peer)
    return fewest(besieged, 0)


@pytest.fixture
def _the_server_is_as_before(besieged: ServerProcess, files: int) -> Iterator[None]:
    before = len(besieged.records())
    yield
    assert fewest(besieged, files) <= files
    assert besieged.process.poll() is None
    assert [one for one in besieged.records()[before:] if one["level"] == "error"] == []


def open_files(server: ServerProcess) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def fewest(server: ServerProcess, enough: int) -> int:
    """Return how few files the server comes to hold open; waits until they are few enough."""
    until, least = time.monotonic() + (TIMEOUT_S if enough else 0.3), open_files(server)
    while least > enough and time.monotonic() < until:
        time.sleep(0.01)
        least = min(least, open_files(server))
    return least


def memory(server: ServerProcess) -> int:
    """Return the bytes that the server holds."""
    pages = Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def answer(peer: socket.socket) -> bytes:
    """Return the message that answers the call under way on a connection."""
    data = b""
    for kind, flags, payload in frames.received(peer):
        if kind == frames.DATA:
            data += payload
        elif kind == frames.PING and not flags & frames.ACK:
            peer.sendall(frames.frame(frames.PING, flags=frames.ACK, payload=payload))
        elif kind == frames.HEADERS and flags & frames.END_STREAM:
            return data[5:]
    raise AssertionError("the connection was closed before the answer")


@pytest.mark.usefixtures("_the_server_is_as_before")
@pytest.mark.parametrize("sent", ATTACKS.values(), ids=ATTACKS)
def test_others_are_answered_while_it_lasts_and_afterwards_nothing_is_left(
    port: int, other: grpc.Channel, sent: bytes
) -> None:
    with ExitStack() as stack:
        peers = [stack.enter_context(frames.connected(port, sent)) for _ in range(12)]
        assert_answers(other)
        for i, peer in enumerate(peers):
            if i % 3 == 0:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST)
            elif i % 3 == 1 and peer.fileno() >= 0:
                half_close(peer)
        assert_answers(other)


def half_close(peer: socket.socket) -> None:
    """Say that nothing more will come, unless the server has left already."""
    try:
        peer.shutdown(socket.SHUT_WR)
    except OSError:
        return


@pytest.mark.usefixtures("_the_server_is_as_before")
def test_none_of_them_keeps_a_connection_open_for_long(port: int, other: grpc.Channel) -> None:
    begun = time.monotonic()
    with ExitStack() as stack:
        peers = [stack.enter_context(frames.connected(port, sent)) for sent in ATTACKS.values()]
        for peer in peers:
            assert len(list(frames.received(peer))) < 5000
        assert time.monotonic() - begun < 10
        assert_answers(other)


def crowd(port: int, other: grpc.Channel) -> None:
    """Hold very many connections open at once; each asks twice."""
    with ExitStack() as stack:
        peers = [
            stack.enter_context(frames.connected(port, BEGIN + call(HEALTH, 1)))
            for _ in range(CROWD)
        ]
        assert {answer(peer) for peer in peers} == {b"\x08\x01"}
        for peer in peers:
            peer.sendall(call(LIST, 3))
        assert_answers(other)
        listed = {answer(peer) for peer in peers}
        assert len(listed) == 1
        assert b"gaussian" in listed.pop()


def test_a_thousand_connections_at_once_are_served_and_leave_no_memory_behind(
    models: Path,
) -> None:
    with ExitStack() as stack:
        with soft_limit(256):
            # Not the server's limit: it takes what the system allows.
            server = stack.enter_context(serving("--models", models, "--threads", 1))
        stack.enter_context(soft_limit(4 * CROWD))
        other = stack.enter_context(grpc.insecure_channel(server.target))
        assert_answers(other)
        files, port = fewest(server, 0), int(server.ready["grpc_port"])
        crowd(port, other)
        assert fewest(server, files) <= files
        first = memory(server)
        crowd(port, other)
        assert fewest(server, files) <= files
        assert memory(server) - first < 16 << 20
        assert_answers(other)
