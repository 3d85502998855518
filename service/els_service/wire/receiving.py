"""Messages on their way in: what has arrived of them is part of one budget, and none takes for ever.

gRPC gives a caller room for a whole message as soon as it is waited for, and hands it over when it
is whole. So every handler waits for its message here. One that is there at once, as nearly all are,
costs a set entry. One that is not is looked at every ten milliseconds: the bytes its connection has
received and not delivered are held in the budget, from which the newest of whoever holds most are
evicted when there is no room.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import grpc

from els_service.engine.budget import Budget, Holding
from els_service.errors import DeadlineExceededError, ElsError, QueueFullError
from els_service.wire.batches import check_cancelled
from els_service.wire.tcp_info import TcpConnections

LARGE_BYTES = 64 << 10
"""A smaller message is not accounted for once it is whole."""
_LOOK_S = 0.01
_LOOK_SHARE = 0.05
"""Part of the event loop's time that looking may take."""
_FORGET_S = 10.0
"""A connection is forgotten when it has had nothing under way for so long."""
_UNSEEN_BYTES = 8 << 20
"""What a message may have received before it is looked at: 20 ms at 3 Gbit/s."""
_FRAME_BYTES, _FRAME_OVERHEAD, _CALL_OVERHEAD = 16 << 10, 9, 64
"""HTTP/2 needs this much beside a message at least."""
_RETRY_S = 1.0
_WHOLE = 2
"""Times its size that a large message holds until it is answered: the message, and the answer."""

Context = Any
Reject = Callable[[Any, ElsError], Awaitable[None]]
"""Ends a call, by its context, with the status of an error, and counts it."""


class _Reading:
    """Message that is waited for."""

    __slots__ = (
        "caller",
        "context",
        "holding",
        "limit_s",
        "looks",
        "peer",
        "reject",
        "rejected",
        "since",
    )

    def __init__(
        self, context: Context, caller: str | None, reject: Reject, limit_s: float | None
    ) -> None:
        self.context, self.caller, self.reject, self.limit_s = context, caller, reject, limit_s
        self.holding: Holding | None = None
        self.looks = 0
        self.peer = ""
        self.since = 0.0
        self.rejected = False


class _Connection:
    """TCP connection with a message that is not there at once."""

    __slots__ = ("base", "delivered", "idle_since", "readings", "received")

    def __init__(self, base: int) -> None:
        self.base = base
        """Bytes received before it was looked at for the first time."""
        self.delivered = self.received = 0
        """Bytes, since then."""
        self.readings: list[_Reading] = []
        self.idle_since = 0.0


class Receiver:
    """Reads the messages of all calls.

    Args:
        budget: in bytes; shared with what waits in queues.
        max_message_bytes: of one message, as gRPC checks at its beginning.
        receive_s: how long a message may take to arrive; one of a stream may take any time.
    """

    def __init__(self, budget: Budget, max_message_bytes: int, receive_s: float) -> None:
        self.budget = budget
        self._max_bytes, self._receive_s = max_message_bytes, receive_s
        self._pending: set[_Reading] = set()
        self._connections: dict[str, _Connection] = {}
        self._sockets = TcpConnections()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def unfinished(self) -> int:
        """Messages that are waited for."""
        return len(self._pending)

    async def read(
        self,
        context: Context,
        caller: str | None,
        reject: Reject,
        *,
        limit_s: float | None = None,
        stream: bool = False,
    ) -> bytes | None:
        """Return the next message of a call; None where there is none.

        Args:
            context: of the call.
            caller: name of the token it showed; None where its connection is the caller.
            reject: called if the message has to give way or comes too late.
            limit_s: how long it may take; None for ``receive_s``.
            stream: whether there may be none, at any time.

        Raises:
            grpc.aio.AbortError: The message was rejected; the call has ended by then.
        """
        if not stream:
            limit_s = limit_s or self._receive_s
        reading = _Reading(context, caller, reject, limit_s)
        self._pending.add(reading)
        if self._timer is None:
            self._look_in(_LOOK_S)
        try:
            message = await context.read()
        finally:
            self._pending.discard(reading)
            if reading.holding is not None:
                self.budget.release(reading.holding)
        check_cancelled()
        if message is grpc.aio.EOF:
            return None
        data: bytes = message
        if self._connections:
            self._deliver(reading, len(data))
        return data

    async def stream(
        self, context: Context, caller: str | None, reject: Reject, parse: Callable[[bytes], Any]
    ) -> AsyncIterator[Any]:
        """Yield the requests of a stream; arguments as of ``read``.

        Args:
            context: of the call.
            caller: as of ``read``.
            reject: as of ``read``.
            parse: makes a request of a message.
        """
        self._track(context.peer())
        while (data := await self.read(context, caller, reject, stream=True)) is not None:
            request = parse(data)
            del data
            yield request
            del request

    def release(self, holding: Holding) -> None:
        """Give a holding back; one that was before is left."""
        self.budget.release(holding)

    def hold(self, context: Context, caller: str | None, size: int) -> Holding:
        """Return the holding of a message over ``LARGE_BYTES`` until its call ends.

        Raises:
            QueueFullError: There is no room for it.
        """
        holding = self.budget.reserve(caller or context.peer(), _WHOLE * size)
        if holding is None:
            raise self._full(f"a message of {size} bytes")
        return holding

    def _full(self, what: str) -> QueueFullError:
        budget = self.budget
        return QueueFullError(
            f"no room for {what}: messages, queues and trajectories of all callers hold "
            f"{budget.used:.0f} of {budget.capacity:.0f} bytes",
            retry_after_s=_RETRY_S,
        )

    def _look_in(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        """Account for what has arrived of messages that were not there at once."""
        began = time.monotonic()
        self._timer = None
        for connection in self._connections.values():
            connection.readings.clear()
        for reading in list(self._pending):
            self._age(reading, began)
        for peer, connection in list(self._connections.items()):
            self._account(peer, connection, began)
        if self._pending or self._connections:
            spent = time.monotonic() - began
            self._look_in(max(_LOOK_S, spent / _LOOK_SHARE))

    def _age(self, reading: _Reading, now: float) -> None:
        """Note the connection of a message that was there at the last look, too."""
        reading.looks += 1
        if reading.looks == 1 or reading.rejected:
            return
        if not reading.peer:
            reading.peer, reading.since = reading.context.peer(), now
        if reading.limit_s is not None and now - reading.since > reading.limit_s:
            text = f"the message did not arrive within {reading.limit_s:g} s"
            self._reject(reading, DeadlineExceededError(text))
            return
        connection = self._connections.get(reading.peer)
        if connection is None:
            received = self._sockets.received(reading.peer) or 0
            connection = _Connection(max(0, received - _UNSEEN_BYTES))
            self._connections[reading.peer] = connection
        connection.readings.append(reading)

    def _track(self, peer: str) -> None:
        """Count a connection's bytes from now on: a stream may wait for its messages for long."""
        if peer not in self._connections:
            received = self._sockets.received(peer) or 0
            self._connections[peer] = _Connection(max(0, received - LARGE_BYTES))
            if self._timer is None:
                self._look_in(_LOOK_S)

    def _account(self, peer: str, connection: _Connection, now: float) -> None:
        readings = connection.readings
        if not readings:
            connection.idle_since = connection.idle_since or now
            if now - connection.idle_since > _FORGET_S:
                del self._connections[peer]
            return
        connection.idle_since = 0.0
        received = self._sockets.received(peer)
        if received is None:
            # A socket of the file system: a unary message may be all there but for a byte.
            sizes = [0 if each.limit_s is None else self._max_bytes for each in readings]
        else:
            unfinished = max(0, received - connection.base - connection.delivered)
            sizes = [min(self._max_bytes, unfinished // len(readings))] * len(readings)
        for reading, size in zip(readings, sizes, strict=True):
            self._hold_unfinished(reading, size)

    def _hold_unfinished(self, reading: _Reading, size: int) -> None:
        if reading.rejected:
            return  # by one before it, just now
        if reading.holding is None:
            evict = partial(self._reject, reading, None)
            reading.holding = self.budget.reserve(reading.caller or reading.peer, size, evict)
            fits = reading.holding is not None
        else:
            fits = self.budget.resize(reading.holding, size)
        if not fits:
            self._reject(reading, None)

    def _reject(self, reading: _Reading, error: ElsError | None) -> None:
        if reading.rejected:
            return
        reading.rejected = True
        error = error or self._full("a message that is being received")
        task = asyncio.ensure_future(_end(reading, error))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _deliver(self, reading: _Reading, size: int) -> None:
        connection = self._connections.get(reading.peer or reading.context.peer())
        if connection is not None:
            frames = 1 + size // _FRAME_BYTES
            connection.delivered += size + frames * _FRAME_OVERHEAD + _CALL_OVERHEAD


async def _end(reading: _Reading, error: ElsError) -> None:
    try:
        await reading.reject(reading.context, error)
    except (grpc.aio.AbortError, grpc.aio.UsageError, asyncio.CancelledError):
        return  # as it should, or the call has ended by itself
