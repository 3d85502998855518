"""HTTP/2 by hand, for peers that no library would be: frames as RFC 9113 lays them out."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, CONTINUATION = 0, 1, 3, 4, 6, 7, 9
WINDOW_UPDATE = 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE = 3, 4


def frame(kind: int, *, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    """Return a frame."""
    return frame_head(kind, len(payload), flags=flags, stream=stream) + payload


def frame_head(kind: int, size: int, *, flags: int = 0, stream: int = 0) -> bytes:
    """Return the head of a frame whose payload has ``size`` bytes."""
    return struct.pack(">I", size)[1:] + struct.pack(">BBI", kind, flags, stream)


def headers(path: str, **more: str) -> bytes:
    """Return a block of a call's headers, as literals that no table knows.

    Args:
        path: of the method.
        more: further headers; an underscore in a name stands for a hyphen.
    """
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
        **{name.replace("_", "-"): value for name, value in more.items()},
    }
    return b"".join(
        b"\x10" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in fields.items()
    )


BEGINNING = PREFACE + frame(SETTINGS)
WITHOUT_WINDOW = PREFACE + frame(SETTINGS, payload=struct.pack(">HI", INITIAL_WINDOW_SIZE, 0))
"""As ``BEGINNING``, of a peer that leaves no room for a byte of any answer."""


def call(path: str, stream: int, message: bytes = b"") -> bytes:
    """Return the frames of a call of one message, which is not longer than a frame may be."""
    data = b"\0" + struct.pack(">I", len(message)) + message
    opening = frame(HEADERS, flags=END_HEADERS, stream=stream, payload=headers(path))
    return opening + frame(DATA, flags=END_STREAM, stream=stream, payload=data)


@contextmanager
def connected(port: int, sent: bytes = b"") -> Iterator[socket.socket]:
    """Yield a socket to a server, over which some bytes have been sent, if it took them all."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as peer:
        with contextlib.suppress(ConnectionError):
            peer.sendall(sent)
        yield peer


def received(peer: socket.socket) -> Iterator[tuple[int, int, bytes]]:
    """Yield kind, flags and payload of each frame until the server closes the connection."""
    with peer.makefile("rb") as stream:
        try:
            while head := stream.read(9):
                size, kind, flags = int.from_bytes(head[:3]), head[3], head[4]
                yield kind, flags, stream.read(size)
        except ConnectionError:
            return
