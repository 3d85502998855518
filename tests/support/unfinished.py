"""Peer that begins messages and does not end them."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable

from tests.support import frames
from tests.support.flow import FRAME, Flow

DENOISE = "/denoise.v1.DenoiserService/Denoise"
HEALTH = "/grpc.health.v1.Health/Check"
ANNOUNCED = 60 << 20
"""Size that each message claims in its header, in bytes."""


class Sender(Flow):
    """Peer that begins calls on one connection, and sends all of their messages but the end.

    Args:
        peer: connected.
        path: of the method.
        calls: how many at once.
        announced: size of each message in its head; None for no head.
    """

    def __init__(
        self, peer: socket.socket, path: str, calls: int, announced: int | None = ANNOUNCED
    ) -> None:
        super().__init__(peer)
        head = b"" if announced is None else b"\0" + struct.pack(">I", announced)
        self.sent = dict.fromkeys(range(1, 2 * calls, 2), 0)
        for stream in self.sent:
            self.open(stream, frames.headers(path))
            self.send(stream, head)

    def run(self, seconds: float) -> None:
        """Send for some seconds, or until the server closes the connection."""
        until = time.monotonic() + seconds
        chunk = memoryview(bytes(FRAME))
        while time.monotonic() < until and not self.closed:
            before = self.room
            for stream, sent in self.sent.items():
                if stream not in self.ended:
                    self.sent[stream] += self.send(stream, chunk[: ANNOUNCED - 1 - sent])
            self.take(0.001 if self.room < before else 0.02)

    def run_until(self, done: Callable[[], bool], timeout_s: float = 20) -> None:
        """Send until something is done.

        Raises:
            TimeoutError: It was not done in time.
        """
        until = time.monotonic() + timeout_s
        while not done():
            if time.monotonic() > until:
                raise TimeoutError(f"not done in {timeout_s} s; ended: {self.ended}")
            self.run(0.05)
