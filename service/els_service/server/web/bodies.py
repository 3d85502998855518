"""Bodies of requests: received and decompressed within the limits, and parsed as JSON."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import orjson

from els_service.config import Limits
from els_service.errors import InvalidArgumentError, ResourceExhaustedError
from els_service.server.requests.message_structure import (
    MessageSizeError,
    MessageStructureError,
    is_gzip,
)
from els_service.server.transport.call_context import caller_of
from els_service.server.transport.connections import LARGE_BYTES
from els_service.server.transport.message_memory import MessageMemory
from els_service.server.web.context import HttpContext

MAX_VALUES = 1 << 18
"""Maximum number of values in a JSON document, counted by its commas, colons and brackets."""
_STRUCTURE = (b",", b":", b"[", b"{")
_SHORT = 64 << 10
"""Maximum size of what is converted on the event loop."""
_CONSTANTS = (b"NaN", b"Infinity")
_CONSTANT = re.compile("NaN|Infinity")
_IDENTITY = ("", "identity")

_T = TypeVar("_T")


@dataclass(frozen=True)
class BodyReader:
    """Reader of bodies.

    Args:
        memory: reserved for a body while it is converted; what arrives is charged by the receiver.
        limits: of requests.
        compression: whether gzip is accepted.
    """

    memory: MessageMemory
    limits: Limits
    compression: bool

    async def converted(self, context: HttpContext, convert: Callable[[bytes], _T]) -> _T:
        """Return the result of a function of the body, off the event loop if the body is large.

        Raises:
            InvalidArgumentError, ResourceExhaustedError, QueueFullError: As ``received`` and
                ``aside``.
        """
        data = await self.received(context)
        return await self.aside(context, len(data), partial(convert, data))

    async def received(self, context: HttpContext) -> bytes:
        """Return the body, decompressed.

        Raises:
            InvalidArgumentError: Its encoding is wrong.
            ResourceExhaustedError, QueueFullError: It is too large, or there is no memory for it.
        """
        encoding = header(context, "content-encoding").lower()
        if encoding not in (*_IDENTITY, *(("gzip",) if self.compression else ())):
            raise InvalidArgumentError("Content-Encoding", self._encodings(), repr(encoding))
        data = await self._received(context)
        return await self._decompressed(context, data) if encoding == "gzip" else data

    async def aside(self, context: HttpContext, size: int, work: Callable[[], _T]) -> _T:
        """Return the result of a function, off the event loop if it takes many bytes.

        Args:
            context: of the call, whose caller is charged.
            size: bytes that the function reads and writes, about.
            work: the function; its exceptions are passed on.

        Raises:
            QueueFullError: There is no memory for it.
        """
        if size <= LARGE_BYTES:
            return work()
        holding = self.memory.reserve(caller_of(context), size)
        try:
            return await asyncio.to_thread(work)
        finally:
            self.memory.budget.release(holding)

    async def _received(self, context: HttpContext) -> bytes:
        most = self.limits.max_message_bytes
        announced = header(context, "content-length")
        if announced.isdecimal() and int(announced[:20]) > most:
            raise ResourceExhaustedError("body", f"at most {most} bytes", announced[:20])
        body = bytearray()
        while True:
            message = await context.receive()
            if message["type"] == "http.disconnect":
                raise asyncio.CancelledError("the client has disconnected")
            body += message.get("body", b"")
            if len(body) > most:
                raise ResourceExhaustedError("body", f"at most {most} bytes", "more")
            if not message.get("more_body", False):
                context.is_read = True
                return bytes(body)

    async def _decompressed(self, context: HttpContext, data: bytes) -> bytes:
        most = self.limits.max_message_bytes
        try:
            if not is_gzip(data):
                raise MessageStructureError("other data")
            return await self.memory.decompressed(caller_of(context), data, most)
        except MessageSizeError as error:
            raise ResourceExhaustedError("body", error.expected, error.got) from None
        except MessageStructureError as error:
            raise InvalidArgumentError("body", "gzip data, by Content-Encoding", error) from None

    def _encodings(self) -> str:
        return "identity or gzip" if self.compression else "identity"


def header(context: HttpContext, name: str) -> str:
    """Return a header of a request; empty if it is absent."""
    return next((value for found, value in context.invocation_metadata() if found == name), "")


def parsed(data: bytes, field: str = "body") -> Any:
    """Return the content of a JSON document.

    A bare NaN or Infinity, which is no JSON but what Python and Triton's client write, is read as
    that number in a short document: whoever checks the number names its field. In a long one it is
    rejected, with its place.

    Raises:
        InvalidArgumentError: It is no JSON.
        ResourceExhaustedError: It has too many values.
    """
    values = sum(map(data.count, _STRUCTURE))
    if values > MAX_VALUES:
        expected = f"at most {MAX_VALUES} JSON values: send tensors as binary data"
        raise ResourceExhaustedError(field, expected, values)
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        reason = str(error)
        constant = _CONSTANT.match(error.doc, error.pos)
    if len(data) <= _SHORT and any(name in data for name in _CONSTANTS):
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            reason = str(error)
    if constant is not None:
        place = f"{constant.group()} at character {constant.start()}"
        raise InvalidArgumentError(field, "finite numbers, as JSON has no others", place)
    raise InvalidArgumentError(field, "JSON", reason)
