"""Parsing of request messages under bounds, and serialisation of responses.

gRPC would decompress without a bound, a protobuf parser may allocate fifty times the size of a
message, and gRPC answers an unparsable message with INTERNAL. So messages are decompressed and
checked here, and an unparsable one becomes ``Malformed``, which ``check_message`` rejects as
INVALID_ARGUMENT.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError

from els_service.config import Limits
from els_service.errors import InvalidArgumentError
from els_service.server.requests.message_structure import (
    GZIP_MAGIC,
    SMALL_BYTES,
    MessageStructureError,
    check_gzip_head,
    check_structure,
    field_of,
    inflated,
)
from els_service.server.telemetry.metrics import Method
from els_service.server.transport.grpc_types import Response
from els_service.server.transport.message_memory import MessageMemory


@dataclass(frozen=True)
class Malformed:
    """Request whose bytes are not a message of its type."""

    reason: str


Parse = Callable[[bytes | Malformed | None], Any]
"""Returns the request of a message, or ``Malformed``; None means that there is no message."""
_BULK_FIELDS = {"x", "inputs"}
"""Fields of requests that have the pixels."""


class Decompressor:
    """Decompression of a method's large gzip messages, off the event loop.

    Args:
        memory: reserved for them.
        deserializer: ``FromString`` of the message class.
        limits: of requests.
    """

    def __init__(self, memory: MessageMemory, deserializer: Any, limits: Limits) -> None:
        self._memory, self._descriptor = memory, deserializer.__self__.DESCRIPTOR
        self._limits = limits

    async def __call__(self, caller: str, data: bytes) -> bytes | Malformed:
        """Return the message, or why it cannot be decompressed.

        Args:
            caller: charged for the memory.
            data: a message for which ``is_large_gzip``.

        Raises:
            QueueFullError: As ``MessageMemory.decompressed``.
        """
        limits = self._limits
        size = limits.max_message_bytes
        try:
            check_gzip_head(data, self._descriptor, limits.max_images, size)
            return await self._memory.decompressed(caller, data, size)
        except MessageStructureError as error:
            return Malformed(str(error))


def parser(
    deserializer: Any, method: Method, limits: Limits, is_model: Callable[[str], bool]
) -> Parse:
    """Return the parser of a method's requests.

    Args:
        deserializer: ``FromString`` of the message class.
        method: counts the messages received.
        limits: of requests.
        is_model: whether a model of that name is served. A large request for another is parsed
            without its pixels: to reject it, its model is enough.
    """
    descriptor = deserializer.__self__.DESCRIPTOR
    fields = descriptor.fields_by_name
    model = fields[method.model_field] if _BULK_FIELDS & set(fields) else None

    def large(data: bytes) -> Any:
        data = inflated(data, limits.max_message_bytes)
        check_structure(data, descriptor, limits.max_images)
        if model is not None and len(data) > SMALL_BYTES:
            only_model = field_of(data, model.number)
            request = deserializer(only_model)
            if not is_model(getattr(request, model.name)):
                return request
        return deserializer(data)

    def parse(data: bytes | Malformed | None) -> Any:
        if data is None:
            return Malformed("none")
        method.received += 1
        if isinstance(data, Malformed):
            return data
        try:
            if len(data) > SMALL_BYTES or data.startswith(GZIP_MAGIC):
                return large(data)
            return deserializer(data)
        except (DecodeError, MessageStructureError) as error:
            return Malformed(str(error) or "truncated or garbage bytes")

    return parse


def check_message(request: object) -> None:
    """Check that a request was parsed.

    Raises:
        InvalidArgumentError: Its bytes are not a message of its type.
    """
    if isinstance(request, Malformed):
        raise InvalidArgumentError("request", "a message of this method", request.reason)


def serializer(serialize: Any) -> Callable[[Response], bytes]:
    """Return a serializer that passes bytes through.

    Args:
        serialize: ``SerializeToString`` of the message class.
    """

    def write(response: Response) -> bytes:
        data: bytes = response if type(response) is bytes else serialize(response)
        return data

    return write
