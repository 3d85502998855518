"""Peer of an HTTP/2 connection that sends within the windows that the server grants."""

from __future__ import annotations

import socket
import struct
from contextlib import suppress

from tests.support import frames

INITIAL_WINDOW = 65535
FRAME = 16384
"""Largest payload of a frame, in bytes."""


class Flow:
    """Windows and ended streams of a connection.

    Args:
        peer: connected.
    """

    def __init__(self, peer: socket.socket) -> None:
        self._peer = peer
        self.room = INITIAL_WINDOW
        """Of the connection, in bytes."""
        self.rooms: dict[int, int] = {}
        """Open stream → its window."""
        self.ended: dict[int, bytes] = {}
        """Stream → the headers that ended it."""
        self.closed = False
        """Whether the server has closed the connection."""
        self._rest = b""
        self._initial = INITIAL_WINDOW

    def open(self, stream: int, block: bytes) -> None:
        """Begin a call by its headers."""
        self._peer.sendall(
            frames.frame(frames.HEADERS, stream=stream, payload=block, flags=frames.END_HEADERS)
        )
        self.rooms[stream] = self._initial

    def send(self, stream: int, data: bytes | memoryview, *, last: bool = False) -> int:
        """Send the beginning of the data that fits the windows and a frame; return its size.

        The stream ends with the data if it is the last, and if all of it was sent.
        """
        size = max(0, min(self.rooms[stream], self.room, FRAME, len(data)))
        if size:
            flags = frames.END_STREAM if last and size == len(data) else 0
            head = frames.frame_head(frames.DATA, size, flags=flags, stream=stream)
            self._peer.sendall(head + bytes(data[:size]))
            self.rooms[stream] -= size
            self.room -= size
        return size

    def take(self, wait_s: float = 0.001) -> None:
        """Handle the frames that have come, or come within ``wait_s``."""
        self._peer.settimeout(wait_s)
        with suppress(TimeoutError, BlockingIOError):
            received = self._peer.recv(1 << 16)
            self.closed = not received
            self._rest += received
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
        if kind == frames.WINDOW_UPDATE:
            more = int.from_bytes(payload)
            if not stream:
                self.room += more
            elif stream in self.rooms:
                self.rooms[stream] += more
        elif kind == frames.SETTINGS and not flags & frames.ACK:
            for at in range(0, len(payload), 6):
                name, value = struct.unpack(">HI", payload[at : at + 6])
                if name == frames.INITIAL_WINDOW_SIZE:
                    for other in self.rooms:
                        self.rooms[other] += value - self._initial
                    self._initial = value
            self._peer.sendall(frames.frame(frames.SETTINGS, flags=frames.ACK))
        elif kind == frames.PING and not flags & frames.ACK:
            self._peer.sendall(frames.frame(frames.PING, flags=frames.ACK, payload=payload))
        elif (kind == frames.HEADERS and flags & frames.END_STREAM) or kind == frames.RST_STREAM:
            self.ended.setdefault(stream, payload)
