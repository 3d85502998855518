"""Bound on the structure of a message, checked on its bytes before they are parsed.

A parser makes up to fifty bytes of one on the wire: of empty sub-messages, of numbers packed as
single bytes. Bulk data, which are strings, ``bytes`` and packed floating-point numbers, cost
what they weigh; everything else of an honest request is a few kilobytes.
"""

from __future__ import annotations

import zlib
from functools import cache
from typing import TypeAlias

from google.protobuf.descriptor import Descriptor, FieldDescriptor

SMALL_BYTES = 64 << 10
"""A message of at most this size is not checked: it cannot cost more than a few megabytes."""
STRUCTURE_BYTES = 32 << 10
"""Everything beside bulk data and what there is one of for each image, in a larger message."""
IMAGE_BYTES = 32
"""Label and window of one image."""
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
"""Becomes four megabytes at most."""

_Fields: TypeAlias = dict[int, Descriptor | None]
"""Number of a length-delimited field → its message; None for bulk data."""


class MessageStructureError(ValueError):
    """The message is truncated, or holds too much beside its bulk data."""


def is_gzip(data: bytes) -> bool:
    """Return whether a message is compressed."""
    return data.startswith(GZIP_MAGIC)


def is_large_gzip(data: bytes) -> bool:
    """Return whether decompressing a message may take more than a few milliseconds."""
    return len(data) > _SMALL_GZIP_BYTES and data.startswith(GZIP_MAGIC)


def announced_bytes(data: bytes) -> int:
    """Return how large a gzip message says it is, at its end (RFC 1952, ISIZE)."""
    return int.from_bytes(data[-4:], "little")


def inflated(data: bytes, max_bytes: int) -> bytes:
    """Return a message, decompressed if it is gzip.

    Args:
        data: as it was received.
        max_bytes: largest size of the message; no more than it announces is decompressed.

    Raises:
        MessageStructureError: It is larger or announces more, or is not gzip after all.
    """
    if not is_gzip(data):
        return data
    announced = announced_bytes(data)
    if announced > max_bytes:
        raise MessageStructureError(f"more than {max_bytes} bytes after decompression")
    inflater = zlib.decompressobj(wbits=31)
    try:
        message = inflater.decompress(data, announced + 1)
    except zlib.error as error:
        raise MessageStructureError(f"gzip: {error}") from None
    if len(message) > announced:
        raise MessageStructureError(f"gzip: expected {announced} bytes, got more")
    if not inflater.eof:
        raise MessageStructureError("gzip that is cut short")
    return message


def check_structure(data: bytes, descriptor: Descriptor, max_images: int) -> None:
    """Check a message on its bytes; takes some milliseconds at most, whatever they hold.

    Args:
        data: the message, decompressed.
        descriptor: of its type.
        max_images: images of one call.

    Raises:
        MessageStructureError: It is truncated, or holds too much that is not bulk data.
    """
    if len(data) > SMALL_BYTES:
        limit = STRUCTURE_BYTES + IMAGE_BYTES * max_images
        _Scan(data, limit).message(0, len(data), descriptor, 0)


class _Scan:
    """Sum of what is not bulk data, over all nested messages."""

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
    """Return a varint and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise MessageStructureError("a number that is cut short or too long")
