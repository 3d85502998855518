"""Peer that begins messages and does not end them."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress

from tests.support import frames

DENOISE = "/denoise.v1.DenoiserService/Denoise"
HEALTH = "/grpc.health.v1.Health/Check"
ANNOUNCED = 60 << 20
"""Size that each message claims in its header, in bytes."""


class Sender:
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
        self._peer = peer
        self.room = 65535
        """Of the connection, in bytes."""
        self.rooms = dict.fromkeys(range(1, 2 * calls, 2), 65535)
        self.sent = dict.fromkeys(self.rooms, 0)
        self.ended: dict[int, bytes] = {}
        """Stream → the headers that ended it."""
        self._rest = b""
        head = b"" if announced is None else b"\0" + struct.pack(">I", announced)
        for stream in self.rooms:
            block = frames.headers(path)
            self._send(frames.HEADERS, stream, block, frames.END_HEADERS)
            if head:
                self._send(frames.DATA, stream, head)
            self.rooms[stream] -= len(head)
            self.room -= len(head)

    def run(self, seconds: float) -> None:
        """Send for some seconds, or until nothing may be sent and nothing comes."""
        until = time.monotonic() + seconds
        chunk = bytes(16384)
        while time.monotonic() < until:
            for stream, room in self.rooms.items():
                size = min(room, self.room, 16384, ANNOUNCED - 1 - self.sent[stream])
                if size > 0 and stream not in self.ended:
                    self._send(frames.DATA, stream, chunk[:size])
                    self.rooms[stream] -= size
                    self.room -= size
                    self.sent[stream] += size
            self._take()

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

    def _send(self, kind: int, stream: int, payload: bytes, flags: int = 0) -> None:
        self._peer.sendall(frames.frame(kind, stream=stream, payload=payload, flags=flags))

    def _take(self) -> None:
        self._peer.settimeout(0.001)
        with suppress(TimeoutError, BlockingIOError):
            self._rest += self._peer.recv(1 << 16)
        self._peer.settimeout(20)
        while len(self._rest) >= 9:
            size = int.from_bytes(self._rest[:3])
            if len(self._rest) < 9 + size:
                return
            kind, flags = self._rest[3], self._rest[4]
            stream = int.from_bytes(self._rest[5:9])
            payload, self._rest = self._rest[9 : 9 + size], self._rest[9 + size :]
            self._frame(kind, flags, stream, payload)

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == 8:  # WINDOW_UPDATE
            more = int.from_bytes(payload)
            if stream:
                self.rooms[stream] += more
            else:
                self.room += more
        elif kind == frames.SETTINGS and not flags & frames.ACK:
            for at in range(0, len(payload), 6):
                name, value = struct.unpack(">HI", payload[at : at + 6])
                if name == 4:  # INITIAL_WINDOW_SIZE
                    for other in self.rooms:
                        self.rooms[other] += value - 65535
            self._peer.sendall(frames.frame(frames.SETTINGS, flags=frames.ACK))
        elif kind == frames.PING and not flags & frames.ACK:
            self._peer.sendall(frames.frame(frames.PING, flags=frames.ACK, payload=payload))
        elif (kind == frames.HEADERS and flags & frames.END_STREAM) or kind == frames.RST_STREAM:
            self.ended.setdefault(stream, payload)
