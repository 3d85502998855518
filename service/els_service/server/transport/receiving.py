"""Receiving and parsing of messages under a time limit and bounds of memory.

gRPC allocates a whole message as soon as a handler awaits it, and returns it once it is complete.
So every handler awaits messages through a ``Receiver``, which registers them with ``LateMessages``.
A message that is complete already, as most are, costs one dictionary entry.

gRPC would decompress without a bound, a protobuf parser may allocate fifty times the size of a
message, and gRPC answers an unparsable message with INTERNAL. So messages are decompressed and
checked here, and an unparsable one becomes ``Malformed``, which ``check_message`` rejects as
INVALID_ARGUMENT.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from els_service.config import Limits
from els_service.engine.budget import Budget
from els_service.errors import InvalidArgumentError, ResourceExhaustedError
from els_service.server.requests.message_structure import (
    GZIP_MAGIC,
    SMALL_BYTES,
    MessageSizeError,
    MessageStructureError,
    check_gzip_head,
    check_structure,
    field_of,
    inflated,
    is_large_gzip,
)
from els_service.server.telemetry.metrics import Method
from els_service.server.transport.call_context import check_cancelled
from els_service.server.transport.grpc_types import Context, Reject, Response
from els_service.server.transport.late_messages import LateMessages
from els_service.server.transport.message_memory import MessageMemory

_BULK_FIELDS = {"x", "inputs"}
"""Fields of requests that have the pixels."""


@dataclass(frozen=True)
class Malformed:
    """Request whose bytes are not a message of its type."""

    reason: str
    error: ResourceExhaustedError | None = None
    """Of a message beyond the limit of size, in place of the reason."""

    @classmethod
    def of(cls, error: Exception) -> Malformed:
        """Return the request in place of a message that cannot be read."""
        if isinstance(error, MessageSizeError):
            excess = ResourceExhaustedError("request", error.expected, error.got)
            return cls(str(error), excess)
        return cls(str(error) or "truncated or garbage bytes")


Parse = Callable[[bytes | Malformed | None], Any]
"""Returns the request of a message, or ``Malformed``; None means that there is no message."""


class Receiver:
    """Reader of the messages of all calls.

    Args:
        budget: in bytes; shared with queues and trajectories.
        max_message_bytes: maximum size of one message, which gRPC enforces.
        receive_s: time limit of a unary message; messages of streams have none.
    """

    def __init__(self, budget: Budget, max_message_bytes: int, receive_s: float) -> None:
        self.receive_s = receive_s
        self.memory = MessageMemory(budget)
        self._late = LateMessages(self.memory, max_message_bytes)

    @property
    def awaited(self) -> int:
        """Number of messages that are being awaited."""
        return len(self._late.awaited)

    def begin(self, context: Context, token: str | None, reject: Reject) -> None:
        """Register the message of a unary call, which has ``receive_s`` to arrive.

        Args:
            context: of the call.
            token: name of the caller's token; None if the connection is the caller.
            reject: called if the message is late or evicted. Awaiting it then raises
                ``grpc.aio.AbortError``.
        """
        late = self._late
        late.awaited[context] = token, reject, self.receive_s, late.scans, None
        if late.timer is None:
            late.schedule()

    def end(self, context: Context, size: int) -> None:
        """Unregister a message that has ``size`` bytes, or never arrives."""
        late = self._late
        awaited = late.awaited.pop(context, None)
        if awaited is not None and (late.connections or late.late):
            late.deliver(context, size, awaited[4])

    async def read(
        self,
        context: Context,
        token: str | None,
        reject: Reject,
        limit_s: float | None,
        peer: str | None = None,
    ) -> bytes | None:
        """Return the next message of a call; None at the end of its stream.

        Args:
            context: as of ``begin``.
            token: as of ``begin``.
            reject: as of ``begin``.
            limit_s: time limit; None is unlimited.
            peer: of the call, if its handler may end before this returns.

        Raises:
            grpc.aio.AbortError: The message was rejected, and the call has ended.
        """
        late = self._late
        late.awaited[context] = token, reject, limit_s, late.scans, peer
        if late.timer is None:
            late.schedule()
        size = 0
        try:
            message = await context.read()
            data = None if message is grpc.aio.EOF else message
            size = len(data or b"")
        finally:
            self.end(context, size)
        check_cancelled()
        return data

    def track(self, peer: str) -> None:
        """Count the bytes of a connection from the start of a stream, which may be idle."""
        self._late.track(peer)

    def close(self) -> None:
        """Stop the accounting."""
        self._late.close()


class RequestStream:
    """Async iterator over the requests of a stream.

    Not a generator: an abandoned one would continue after the end of its call.

    Args:
        receiver: reads them.
        context: of the call, which must be in progress.
        token: as of ``Receiver.begin``.
        reject: as of ``Receiver.begin``.
        parse: returns the request of a message.
        decompress: returns what is parsed of a large gzip message, charged to a caller.
        limit_s: time that a message may take to arrive; None for unlimited.
    """

    def __init__(
        self,
        receiver: Receiver,
        context: Context,
        token: str | None,
        reject: Reject,
        parse: Callable[[Any], Any],
        decompress: Callable[[str, bytes], Awaitable[Any]],
        limit_s: float | None = None,
    ) -> None:
        self._receiver, self._context, self._parse = receiver, context, parse
        self._token, self._reject, self._decompress = token, reject, decompress
        self._limit_s = limit_s
        self._peer: str = context.peer()
        self._ended = False
        receiver.track(self._peer)

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> Any:
        receiver, context = self._receiver, self._context
        if self._ended:
            raise StopAsyncIteration
        data = await receiver.read(context, self._token, self._reject, self._limit_s, self._peer)
        if data is None:
            raise StopAsyncIteration
        if is_large_gzip(data):
            caller = self._token or self._peer
            return self._parse(await self._decompress(caller, data))
        return self._parse(data)

    def close(self) -> None:
        """End the iteration; called before the call ends."""
        self._ended = True
        self._receiver.end(self._context, 0)


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
            return Malformed.of(error)


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
            return Malformed.of(error)

    return parse


def check_message(request: object) -> None:
    """Check that a request was parsed.

    Raises:
        InvalidArgumentError: Its bytes are not a message of its type.
        ResourceExhaustedError: It is too large after decompression.
    """
    if isinstance(request, Malformed):
        if request.error is not None:
            raise request.error
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
