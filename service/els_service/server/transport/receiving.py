"""Receiving of messages under a time limit and the budget of bytes in flight.

gRPC allocates a whole message as soon as a handler awaits it, and returns it once it is complete.
So every handler awaits messages through a ``Receiver``, which registers them with ``LateMessages``.
A message that is complete already, as most are, costs one dictionary entry.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from els_service.engine.budget import Budget
from els_service.server.requests.message_structure import is_large_gzip
from els_service.server.transport.grpc_types import Context, Reject
from els_service.server.transport.grpc_workarounds import check_cancelled
from els_service.server.transport.late_messages import LateMessages
from els_service.server.transport.message_memory import MessageMemory


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
        """Register the message of a unary call; ``read`` includes it.

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
        self.begin(context, token, reject)
        late = self._late
        late.awaited[context] = token, reject, limit_s, late.scans, peer
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
