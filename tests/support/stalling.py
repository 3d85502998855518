"""Peers that watch the health and take no answer, as a hostile or an unlucky one would."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from grpc_health.v1 import health_pb2
from tests.support import frames
from tests.support.bad_requests import sample
from tests.support.refusals import TIMEOUT_S

from els_service.server.services.health import WRITES_OF_PEER

WATCH = "/grpc.health.v1.Health/Watch"
SAMPLE = "/denoise.v1.DenoiserService/Sample"
WINDOW = 65535
"""What a connection takes before its peer says otherwise."""

Answers = Iterator[tuple[int, int, bytes]]
"""Kind, flags and payload of frames."""


def watches(services: Sequence[str], first: int = 1) -> bytes:
    """Return the frames of a watch of each service, on streams from ``first`` on."""
    return b"".join(
        frames.call(
            WATCH, first + 2 * i, health_pb2.HealthCheckRequest(service=name).SerializeToString()
        )
        for i, name in enumerate(services)
    )


def await_headers(answers: Answers, count: int) -> None:
    """Read until as many of so many calls are answered as may be: their messages are held back."""
    count = min(count, WRITES_OF_PEER)
    for kind, flags, _ in answers:
        assert kind != frames.DATA
        if kind == frames.HEADERS:
            assert not flags & frames.END_STREAM
            count -= 1
        if not count:
            return
    raise AssertionError("the connection was closed")


def await_full(answers: Answers) -> None:
    """Read until the connection's window is used up."""
    room = WINDOW
    for kind, _, payload in answers:
        room -= len(payload) if kind == frames.DATA else 0
        if not room:
            return
    raise AssertionError("the connection was closed")


def _without_window(peer: socket.socket, services: Sequence[str]) -> None:
    peer.sendall(frames.WITHOUT_WINDOW + watches(services))
    await_headers(frames.received(peer), len(services))


def _behind_a_sample(peer: socket.socket, services: Sequence[str]) -> None:
    request = sample(model="gaussian", steps=1000, count=64, return_x=True)
    peer.sendall(frames.BEGINNING + frames.call(SAMPLE, 1, request.SerializeToString()))
    answers = frames.received(peer)
    await_full(answers)
    peer.sendall(watches(services, first=3))
    await_headers(answers, len(services))


NO_WINDOW = "no window"
KINDS: dict[str, Callable[[socket.socket, Sequence[str]], None]] = {
    NO_WINDOW: _without_window,
    "a connection full of steps that nobody reads": _behind_a_sample,
}


@contextmanager
def stalled(
    port: int, services: Sequence[str], connections: int = 1, kind: str = NO_WINDOW
) -> Iterator[list[socket.socket]]:
    """Yield connections that watch all of the services and take none of the answers."""
    with ExitStack() as stack:
        peers = [stack.enter_context(connected_when_bound(port)) for _ in range(connections)]
        for peer in peers:
            KINDS[kind](peer, services)
        yield peers


@contextmanager
def connected_when_bound(port: int) -> Iterator[socket.socket]:
    """Yield a connection to a server that may only be starting."""
    until = time.monotonic() + TIMEOUT_S
    while True:
        try:
            peer = socket.create_connection(("127.0.0.1", port), timeout=20)
            break
        except ConnectionRefusedError:
            assert time.monotonic() < until
            time.sleep(0.01)  # nothing tells when a port of another process is bound
    with peer:
        yield peer
