"""Bound on the structure of a message, checked on its bytes before they are parsed.

A protobuf parser may allocate fifty times the size of a message, for empty sub-messages or packed
single-byte integers. Bulk data (strings, ``bytes``, packed floating-point numbers) parse to about
their size; everything else in a legitimate request has a few kilobytes.
"""

from __future__ import annotations

import zlib
from contextlib import suppress
from functools import cache
from typing import TypeAlias

from google.protobuf.descriptor import Descriptor, FieldDescriptor

SMALL_BYTES = 64 << 10
"""Maximum size of a message that is not checked; it parses to a few megabytes at most."""
STRUCTURE_BYTES = 32 << 10
"""Maximum bytes beside bulk data and ``IMAGE_BYTES`` per image in a larger message."""
IMAGE_BYTES = 32
"""Maximum bytes of the label and window of one image."""
_DEPTH = 16
_BULK = frozenset(
    {
        FieldDescriptor.TYPE_BYTES,
        FieldDescriptor.TYPE_STRING,
        FieldDescriptor.TYPE_FLOAT,
        FieldDescriptor.TYPE_DOUBLE,
    }
)
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
GZIP_MAGIC = b"\x1f\x8b"
"""Start of gzip data; never that of a message, as 0x1f has a wire type that does not exist."""
_SMALL_GZIP_BYTES = 4 << 10
"""Maximum size of gzip data that is decompressed on the event loop: to four megabytes at most."""

_MOST_RATIO = 1032
"""Bytes that one of deflate decompresses to at most: 258 of two bits (RFC 1951), as in zlib's
documentation. Truncated data, whose end is no size, mostly announce more."""

_SLICE_BYTES, _PART_BYTES = 64 << 10, 1 << 20
"""Input and output of one step of decompression."""

_Fields: TypeAlias = dict[int, Descriptor | None]
"""Number of a length-delimited field → its message type; None for bulk data."""


class MessageStructureError(ValueError):
    """The message is truncated, or has too much structure beside its bulk data."""


class MessageSizeError(MessageStructureError):
    """The message announces more bytes after decompression than are allowed.

    Args:
        max_bytes: allowed.
        announced: size of the message.
    """

    def __init__(self, max_bytes: int, announced: int) -> None:
        self.expected = f"at most {max_bytes} bytes after decompression"
        self.got = f"{announced}"
        super().__init__(f"more than {max_bytes} bytes after decompression")


def is_gzip(data: bytes) -> bool:
    """Return whether a message is gzip data."""
    return data.startswith(GZIP_MAGIC)


def is_large_gzip(data: bytes) -> bool:
    """Return whether decompression of a message may take more than a few milliseconds."""
    return len(data) > _SMALL_GZIP_BYTES and data.startswith(GZIP_MAGIC)


def announced_bytes(data: bytes) -> int:
    """Return the size that gzip data announce at their end (RFC 1952, ISIZE)."""
    return int.from_bytes(data[-4:], "little")


def inflated(data: bytes, max_bytes: int) -> bytes:
    """Return a message, decompressed if it is gzip data.

    Args:
        data: as received.
        max_bytes: maximum size of the message; no more than announced is decompressed.

    Raises:
        MessageSizeError: It announces more than ``max_bytes``.
        MessageStructureError: It exceeds its announced size, or is malformed.
    """
    if not is_gzip(data):
        return data
    announced = _announced(data, max_bytes)
    # In one buffer of its size: the blocks in which zlib grows an output would stay in malloc.
    message, size = bytearray(announced), 0
    inflater = zlib.decompressobj(wbits=31)
    for at in range(0, len(data), _SLICE_BYTES):
        rest = data[at : at + _SLICE_BYTES]
        while rest and not inflater.eof:
            try:
                part = inflater.decompress(rest, _PART_BYTES)
            except zlib.error as error:
                raise MessageStructureError(f"gzip: {error}") from None
            if size + len(part) > announced:
                raise MessageStructureError(f"gzip: expected {announced} bytes, got more")
            message[size : size + len(part)] = part
            size, rest = size + len(part), inflater.unconsumed_tail
    if not inflater.eof:
        raise MessageStructureError("truncated gzip data")
    return bytes(memoryview(message)[:size])


def check_gzip_head(data: bytes, descriptor: Descriptor, max_images: int, max_bytes: int) -> None:
    """Check the structure of gzip data as far as their first ``SMALL_BYTES`` show it.

    A field announces its size before its content: excess is found without decompressing it.

    Args:
        data: as received.
        descriptor: of the message's type.
        max_images: maximum images of one call.
        max_bytes: maximum size of the message.

    Raises:
        MessageStructureError: As ``inflated`` and ``check_structure``.
    """
    announced = _announced(data, max_bytes)
    try:
        head = zlib.decompressobj(wbits=31).decompress(data[:_SLICE_BYTES], SMALL_BYTES)
    except zlib.error as error:
        raise MessageStructureError(f"gzip: {error}") from None
    with suppress(IndexError):  # the end of the head
        _scan(head, announced, descriptor, max_images)


def field_of(data: bytes, number: int) -> bytes:
    """Return the last field of that number in a message, with its tag; empty if there is none.

    Args:
        data: a message that ``check_structure`` has checked.
        number: of a length-delimited field.
    """
    at, found = 0, b""
    while at < len(data):
        start = at
        tag, at = _varint(data, at, len(data))
        kind = tag & 7
        if kind == _LENGTH:
            size, at = _varint(data, at, len(data))
            at += size
        elif kind == _VARINT:
            _, at = _varint(data, at, len(data))
        else:
            at += 8 if kind == _FIXED64 else 4
        if tag == number << 3 | _LENGTH:
            found = data[start:at]
    return found


def check_structure(data: bytes, descriptor: Descriptor, max_images: int) -> None:
    """Check the bytes of a message, in a few milliseconds at most.

    Args:
        data: the message, decompressed.
        descriptor: of its type.
        max_images: maximum images of one call.

    Raises:
        MessageStructureError: It is truncated, or has too much structure beside its bulk data.
    """
    if len(data) > SMALL_BYTES:
        _scan(data, len(data), descriptor, max_images)


def _announced(data: bytes, max_bytes: int) -> int:
    """Return the announced size of gzip data that is at most ``max_bytes``."""
    announced = announced_bytes(data)
    if announced > _MOST_RATIO * len(data):
        raise MessageStructureError("gzip: its end announces more bytes than it can hold")
    if announced > max_bytes:
        raise MessageSizeError(max_bytes, announced)
    return announced


def _scan(data: bytes, size: int, descriptor: Descriptor, max_images: int) -> None:
    """Scan a message of ``size`` bytes; IndexError if ``data`` are shorter and in order."""
    limit = STRUCTURE_BYTES + IMAGE_BYTES * max_images
    _Scan(data, limit).message(0, size, descriptor, 0)


class _Scan:
    """Sum of the bytes beside bulk data, over all nested messages."""

    def __init__(self, data: bytes, limit: int) -> None:
        self._data, self._limit, self._structure = data, limit, 0

    def message(self, at: int, end: int, descriptor: Descriptor, depth: int) -> None:
        if depth > _DEPTH:
            raise MessageStructureError(f"messages nested deeper than {_DEPTH}")
        data, fields = self._data, _fields(descriptor)
        while at < end:
            start = at
            tag, at = _varint(data, at, end)
            kind, number = tag & 7, tag >> 3
            if kind == _LENGTH:
                size, at = _varint(data, at, end)
                stop = at + size
                inner = fields.get(number, False)
                self._count(at - start if inner is not False else stop - start)
                if stop > end:
                    raise MessageStructureError("a field beyond the end of the message")
                if isinstance(inner, Descriptor):
                    self.message(at, stop, inner, depth + 1)
                at = stop
                continue
            if kind == _VARINT:
                _, at = _varint(data, at, end)
            elif kind in (_FIXED64, _FIXED32):
                at += 8 if kind == _FIXED64 else 4
            else:
                raise MessageStructureError(f"a field of wire type {kind}")
            self._count(at - start)

    def _count(self, size: int) -> None:
        self._structure += size
        if self._structure > self._limit:
            raise MessageStructureError(f"more than {self._limit} bytes beside its bulk data")


@cache
def _fields(descriptor: Descriptor) -> _Fields:
    fields: _Fields = {}
    for field in descriptor.fields:
        if field.message_type is not None:
            fields[field.number] = field.message_type
        elif field.type in _BULK:
            fields[field.number] = None
    return fields


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """Return a varint and the offset of its end."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise MessageStructureError("a truncated or overlong varint")
