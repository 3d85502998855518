"""Messages between a server and the processes of its shards: numbers, texts and arrays.

A message is a header in JSON and the bytes of arrays. Nothing in it is executed, and arrays are of
known types. Framed for streams: 8 bytes with the length of the header, the header, the arrays.
"""

from __future__ import annotations

import json
import math
import select
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

_DTYPES = {name: np.dtype(name) for name in ("float32", "float64", "int32", "int64", "uint8")}
_MOST_HEADER = 64 << 20
"""Maximum bytes of a header; that of a load has a digest of each block."""
_POLL_S = 0.25

Array = NDArray[Any]


class ClosedError(Exception):
    """The other side closed the connection, or sent what is no message."""


@dataclass(frozen=True, eq=False)
class Message:
    """An operation or its answer."""

    op: str
    fields: dict[str, Any] = field(default_factory=dict)
    """Values of JSON."""
    arrays: Sequence[Array] = ()
    number: int = 0
    """Of the operation, which its answer repeats."""


def encode(message: Message) -> list[bytes | memoryview]:
    """Return the parts of a framed message; arrays in C order are not copied."""
    arrays = [np.ascontiguousarray(array) for array in message.arrays]
    described = [[array.dtype.name, array.shape] for array in arrays]
    header = json.dumps([message.op, message.number, message.fields, described]).encode()
    views = [array.reshape(-1).view(np.uint8).data for array in arrays]
    return [len(header).to_bytes(8, "little"), header, *views]


def send(connection: socket.socket, message: Message) -> None:
    """Send a message whole; blocks while the other side does not read.

    Raises:
        OSError: The connection is closed.
    """
    first, header, *views = encode(message)
    connection.sendall(bytes(first) + bytes(header))
    for view in views:
        connection.sendall(view)


def receive(connection: socket.socket, idle: Callable[[], None] | None = None) -> Message:
    """Return the next message.

    Args:
        connection: a blocking socket.
        idle: called a few times a second while nothing arrives; may raise.

    Raises:
        ClosedError: The connection is closed, or what arrived is no message.
    """

    def fill(view: memoryview) -> None:
        while len(view):
            if idle is not None and not select.select([connection], [], [], _POLL_S)[0]:
                idle()
                continue
            count = _received(connection, view)
            view = view[count:]

    length = bytearray(8)
    fill(memoryview(length))
    size = int.from_bytes(length, "little")
    if size > _MOST_HEADER:
        raise ClosedError(f"expected a header of at most {_MOST_HEADER} bytes, got {size}")
    header = bytearray(size)
    fill(memoryview(header))
    return _decoded(header, lambda array: fill(array.reshape(-1).view(np.uint8).data))


def parse(data: bytes) -> Message:
    """Return the message that is framed in bytes.

    Raises:
        ClosedError: They are no message.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    view, at = memoryview(data), start

    def fill(array: Array) -> None:
        nonlocal at
        array.reshape(-1).view(np.uint8)[:] = np.frombuffer(view[at : at + array.nbytes], np.uint8)
        at += array.nbytes

    return _decoded(view[8:start], fill)


def _received(connection: socket.socket, view: memoryview) -> int:
    try:
        count = connection.recv_into(view)
    except OSError as error:
        raise ClosedError(str(error)) from error
    if not count:
        raise ClosedError("the other side closed the connection")
    return count


def _decoded(header: bytearray | memoryview, fill: Callable[[Array], None]) -> Message:
    try:
        op, number, fields, described = json.loads(bytes(header))
        arrays = [np.empty(shape, _DTYPES[name]) for name, shape in described]
    except (ValueError, TypeError, KeyError) as error:
        raise ClosedError(f"expected a message, got {error!r}") from error
    for array in arrays:
        if math.prod(array.shape):
            fill(array)
    return Message(op, fields, arrays, number)
