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
    check_structure,
    inflated,
)
from els_service.server.telemetry.metrics import Method
from els_service.server.transport.grpc_types import Response

Parse = Callable[[bytes | None], Any]
"""Returns the request of a message, or ``Malformed``; None means that there is no message."""


@dataclass(frozen=True)
class Malformed:
    """Request whose bytes are not a message of its type."""

    reason: str


def parser(deserializer: Any, method: Method, limits: Limits) -> Parse:
    """Return the parser of a method's requests.

    Args:
        deserializer: ``FromString`` of the message class.
        method: counts the messages received.
        limits: of requests.
    """
    descriptor = deserializer.__self__.DESCRIPTOR

    def parse(data: bytes | None) -> Any:
        if data is None:
            return Malformed("none")
        method.received += 1
        try:
            if len(data) > SMALL_BYTES or data.startswith(GZIP_MAGIC):
                data = inflated(data, limits.max_message_bytes)
                check_structure(data, descriptor, limits.max_images)
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
