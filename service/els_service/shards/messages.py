"""Messages between a server and the processes of its shards: numbers, texts and arrays.

A message is a header in JSON and the bytes of arrays. Nothing in it is executed, and arrays are of
known types. Framed for streams: 8 bytes with the length of the header, the header, the arrays.
Answers to a server on the same machine have their arrays in memory that both map, if they fit: the
server reads them where the kernel wrote them.
"""

from __future__ import annotations

import json
import math
import mmap
import select
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

_DTYPES = {name: np.dtype(name) for name in ("float32", "float64", "int32", "int64", "uint8")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MOST_HEADER = 64 << 20
"""Maximum bytes of a header; that of a load has a digest of each block."""
_POLL_S = 0.25
_SHARED = 1 << 63
"""Bit of the length of a header whose arrays are in shared memory."""
SHARED_BYTES = 64 << 20
"""Of the memory that a shard and its server share; only what is used takes memory."""
ARRAYS_AT = 4096
"""Where arrays start in it; before, the process has the control of its operation."""
_ALIGNMENT = 64
_TOGETHER = 1 << 16
"""Bytes that are sent or received at once."""

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

    @cached_property
    def frame(self) -> bytes:
        """The framed message, the same bytes for every shard that is asked."""
        return b"".join(encode(self))


_NUMBERS = count(1)


def numbered(
    op: str, fields: dict[str, Any] | None = None, arrays: Sequence[Array] = ()
) -> Message:
    """Return an operation with a number above those of all operations before."""
    return Message(op, fields or {}, arrays, next(_NUMBERS))


def encode(message: Message) -> list[bytes | memoryview]:
    """Return the parts of a framed message; arrays in C order are not copied."""
    arrays = [np.ascontiguousarray(array) for array in message.arrays]
    described = [[_NAMES[array.dtype], array.shape] for array in arrays]
    header = json.dumps([message.op, message.number, message.fields, described]).encode()
    views = [array.reshape(-1).view(np.uint8).data for array in arrays]
    return [len(header).to_bytes(8, "little"), header, *views]


def send(connection: socket.socket, message: Message, shared: mmap.mmap | None = None) -> None:
    """Send a message whole; blocks while the other side does not read.

    Args:
        connection: a blocking socket.
        message: what to send.
        shared: memory of both sides for the arrays, which the next message overwrites. Those that
            are in it already stay where they are.

    Raises:
        OSError: The connection is closed.
    """
    if shared is not None and message.arrays:
        placed = _placed(message, shared)
        if placed is not None:
            connection.sendall(placed)
            return
    if sum(array.nbytes for array in message.arrays) <= _TOGETHER:
        connection.sendall(message.frame)
        return
    first, header, *views = encode(message)
    connection.sendall(bytes(first) + bytes(header))
    for view in views:
        connection.sendall(view)


def _placed(message: Message, shared: mmap.mmap) -> bytes | None:
    """Return the frame of a message whose arrays are in shared memory; None if they do not fit."""
    whole = np.frombuffer(shared, np.uint8)
    begin, size = whole.ctypes.data, len(whole)
    described = []
    arrays = [np.ascontiguousarray(array) for array in message.arrays]
    places = [array.ctypes.data - begin for array in arrays]
    # Behind those that are there.
    here = [
        place + array.nbytes
        for place, array in zip(places, arrays, strict=True)
        if 0 <= place < size
    ]
    end = max([ARRAYS_AT, *here])
    for array, place in zip(arrays, places, strict=True):
        if not 0 <= place < size:
            place = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = place + array.nbytes
            if end > size:
                return None
            whole[place:end] = array.reshape(-1).view(np.uint8)
        described.append([_NAMES[array.dtype], array.shape, place])
    header = json.dumps([message.op, message.number, message.fields, described]).encode()
    return (len(header) | _SHARED).to_bytes(8, "little") + header


class Receiver:
    """The messages of a connection, one after another.

    Args:
        connection: a blocking socket.
        shared: memory of both sides for arrays, of which messages have views: the next message
            overwrites them.
    """

    def __init__(self, connection: socket.socket, shared: mmap.mmap | None = None) -> None:
        self._connection, self._shared = connection, shared
        self._buffer = memoryview(bytearray(_TOGETHER))
        self._received = self._buffer[:0]

    def receive(self, idle: Callable[[], None] | None = None) -> Message:
        """Return the next message.

        Args:
            idle: called a few times a second while nothing arrives; may raise.

        Raises:
            ClosedError: The connection is closed, or what arrived is no message.
        """

        def fill(view: memoryview) -> None:
            self._fill(view, idle)

        length = bytearray(8)
        fill(memoryview(length))
        size = int.from_bytes(length, "little")
        in_shared, size = bool(size & _SHARED), size & ~_SHARED
        if size > _MOST_HEADER:
            raise ClosedError(f"expected a header of at most {_MOST_HEADER} bytes, got {size}")
        header = bytearray(size)
        fill(memoryview(header))
        if in_shared and self._shared is not None:
            return _viewed(header, self._shared)
        return _decoded(header, lambda array: fill(array.reshape(-1).view(np.uint8).data))

    def _fill(self, view: memoryview, idle: Callable[[], None] | None) -> None:
        while len(view):
            if not len(self._received):
                if idle is not None and not select.select([self._connection], [], [], _POLL_S)[0]:
                    idle()
                    continue
                # What is large is not copied twice.
                to = view if len(view) >= len(self._buffer) else self._buffer
                count = _received(self._connection, to)
                if to is view:
                    view = view[count:]
                    continue
                self._received = self._buffer[:count]
            count = min(len(view), len(self._received))
            view[:count] = self._received[:count]
            view, self._received = view[count:], self._received[count:]


def parse(data: bytes) -> Message:
    """Return the message that is framed in bytes.

    Raises:
        ClosedError: They are no message.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    return _decoded(memoryview(data)[8:start], _filler(data, start))


def _filler(data: bytes, start: int) -> Callable[[Array], None]:
    """Return a function that fills arrays from bytes, one after another."""
    at = start

    def fill(array: Array) -> None:
        nonlocal at
        if at + array.nbytes > len(data):
            raise ClosedError(f"expected {at + array.nbytes} bytes, got {len(data)}")
        source = np.frombuffer(data, np.uint8, array.nbytes, at)
        array.reshape(-1).view(np.uint8)[:] = source
        at += array.nbytes

    return fill


def _received(connection: socket.socket, view: memoryview) -> int:
    try:
        count = connection.recv_into(view)
    except OSError as error:
        raise ClosedError(str(error)) from error
    if not count:
        raise ClosedError("the other side closed the connection")
    return count


def _decoded(header: bytearray | memoryview, fill: Callable[[Array], None]) -> Message:
    op, number, fields, described = _header(header)
    try:
        arrays = [np.empty(shape, _DTYPES[name]) for name, shape in described]
    except (ValueError, TypeError, KeyError) as error:
        raise ClosedError(f"expected a message, got {error!r}") from error
    for array in arrays:
        if math.prod(array.shape):
            fill(array)
    return Message(op, fields, arrays, number)


def _viewed(header: bytearray, shared: mmap.mmap) -> Message:
    op, number, fields, described = _header(header)
    try:
        arrays = [
            np.frombuffer(shared, _DTYPES[name], math.prod(shape), at).reshape(shape)
            for name, shape, at in described
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise ClosedError(f"expected a message, got {error!r}") from error
    return Message(op, fields, arrays, number)


def _header(header: bytearray | memoryview) -> tuple[str, int, dict[str, Any], list[Any]]:
    try:
        op, number, fields, described = json.loads(bytes(header))
    except (ValueError, TypeError) as error:
        raise ClosedError(f"expected a message, got {error!r}") from error
    return op, number, fields, described
