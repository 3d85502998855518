"""Receiving of messages: bytes in flight count in one budget, and have a time limit.

gRPC gives a caller room for a whole message as soon as it is waited for, and hands it over when it
is whole. So every handler waits for its messages through a ``Receiver``. A message that is there at
once, as nearly all are, costs a dictionary entry. One that is not is looked at every 10 ms: the
bytes that its connection received and did not deliver are held in the budget. When there is no
room, the newest message of the caller that holds most is rejected.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import grpc

from els_service.engine.budget import Budget, Holding
from els_service.errors import DeadlineExceededError, ElsError, QueueFullError
from els_service.server.requests.message_structure import (
    MessageStructureError,
    announced_bytes,
    inflated,
    is_large_gzip,
)
from els_service.server.transport.caller import set_token_name
from els_service.server.transport.grpc_workarounds import check_cancelled
from els_service.server.transport.tcp_info import TcpConnections, shut_down

LARGE_BYTES = 64 << 10
"""A smaller message is not accounted for once it is whole."""
_WHOLE = 2
"""Times its size that a larger one holds until it is answered: the message, and its answer."""
_LOOK_S = 0.01
_DOUBLINGS = 10
_LOOK_SHARE = 0.05
"""Part of the event loop's time that looking may take."""
_UNSEEN_BYTES = 8 << 20
"""What a message may have received before it is looked at: 20 ms at 3 Gbit/s."""
_SLOW_S = 0.1
"""Until a message has been late for so long nothing that may have come unseen is charged."""
_SCAN_S = 1.0
"""Between looks for a connection's further sockets while a message on it is late."""
_UNREAD_S = 1.0
"""An answer that has not left for so long may be evicted, by ending its connection."""
_FORGET_S = 10.0
"""A connection is forgotten when nothing of it was late for so long."""
_FRAME_BYTES, _FRAME_OVERHEAD, _CALL_OVERHEAD = 16 << 10, 9, 200
"""HTTP/2 and headers need about this much beside a message."""
_RETRY_S = 1.0
_DECOMPRESSIONS = 2
"""Messages that are decompressed at once, each in a thread."""
_HEAD_BYTES = 64
"""Of a message that cannot be decompressed: enough to see that."""

_log = logging.getLogger(__name__)
_NO_VARIABLES = contextvars.Context()

Context = Any
Reject = Callable[[Any, ElsError], Awaitable[None]]
"""Ends a call, by its context, with the status of an error, and counts it."""
_Terms = tuple[str | None, Reject, float | None, int, str | None]
"""Name of the token, how to reject, how long the message may take (None for any time), how many
looks there were before, and the peer.

Without a peer its handler waits for the message itself, so the call is alive and its context can be
asked. To ask the context of a call that has ended ends the process.
"""


class _Late:
    """Message that was not there at once."""

    __slots__ = (
        *("caller", "context", "holding", "limit_s", "peer"),
        *("reject", "rejected", "since", "token"),
    )

    def __init__(self, context: Context, terms: _Terms, now: float) -> None:
        self.context, (self.token, self.reject, self.limit_s, _, peer) = context, terms
        self.peer: str = peer or context.peer()
        self.caller = self.token or self.peer
        self.since = now
        self.holding: Holding | None = None
        self.rejected = False


class _Connection:
    """Connection with a late message, or a stream.

    Args:
        unseen: bytes at most that a late message may have received before the first look.
        now: on the monotonic clock.
    """

    __slots__ = ("_delivered_since", "_mark", "base", "delivered", "idle_since", "late", "unseen")

    def __init__(self, unseen: int, now: float) -> None:
        self.base: int | None = None
        """Bytes received before any of a message that is late now; None before the first look."""
        self.delivered = 0
        """Bytes of messages since then."""
        self.unseen = unseen
        self._mark: int | None = None
        """Bytes received at the look before the latest one at which nothing was late."""
        self._delivered_since = 0
        self.late: list[_Late] = []
        self.idle_since = now

    def unfinished(self, received: int, now: float) -> int:
        """Return the bytes of messages that are not complete.

        Args:
            received: of the connection, in all.
            now: on the monotonic clock.
        """
        if self.base is None:
            self.base = max(0, received - LARGE_BYTES)
            self.unseen = min(self.unseen, self.base)
        if self.unseen and now - min(late.since for late in self.late) > _SLOW_S:
            self.base, self.unseen = self.base - self.unseen, 0
        unfinished = received - self.base - self.delivered
        if unfinished < 0:
            # Overheads are estimates: what was subtracted in excess is no credit.
            self.base += unfinished
        return max(0, unfinished)

    def deliver(self, size: int) -> None:
        """Note that a message of ``size`` bytes is complete, or was given up."""
        frames = 1 + size // _FRAME_BYTES
        whole = size + frames * _FRAME_OVERHEAD + _CALL_OVERHEAD
        self.delivered += whole
        self._delivered_since += whole

    def settle(self, received: int | None) -> None:
        """Note that no message is late: what was received before the last look is delivered."""
        self.base = received if self._mark is None else self._mark
        self.delivered, self.unseen = self._delivered_since, 0
        self._mark, self._delivered_since = received, 0


class Messages:
    """Requests of a stream, read one after the other as they are asked for.

    No generator: one that is abandoned would go on when its call has ended.

    Args:
        receiver: waits for them.
        context: of the call; it must be alive.
        caller: as of ``Receiver.begin``.
        reject: as of ``Receiver.begin``.
        parse: makes a request of a message.
        max_bytes: of a message, decompressed.
        limit_s: how long a message may take to arrive; None for any time.
    """

    def __init__(
        self,
        receiver: Receiver,
        context: Context,
        caller: str | None,
        reject: Reject,
        parse: Callable[[bytes], Any],
        max_bytes: int,
        limit_s: float | None = None,
    ) -> None:
        self._receiver, self._context, self._parse = receiver, context, parse
        self._limit_s = limit_s
        self._caller, self._reject, self._max_bytes = caller, reject, max_bytes
        self._peer: str = context.peer()
        self._ended = False
        receiver.track(self._peer)

    def __aiter__(self) -> Messages:
        return self

    async def __anext__(self) -> Any:
        receiver, context = self._receiver, self._context
        if self._ended:
            raise StopAsyncIteration
        data = await receiver.read(context, self._caller, self._reject, self._limit_s, self._peer)
        if data is None:
            raise StopAsyncIteration
        if is_large_gzip(data):
            caller = self._caller or self._peer
            data = await receiver.decompressed(caller, data, self._max_bytes)
        return self._parse(data)

    def close(self) -> None:
        """Wait for no further message; called before the call ends."""
        self._ended = True
        self._receiver.end(self._context, 0)


class Receiver:
    """Reader of the messages of all calls.

    Args:
        budget: in bytes; shared with what waits in queues.
        max_message_bytes: of one message, as gRPC checks at its beginning.
        receive_s: how long a message may take to arrive; one of a stream may take any time.
    """

    def __init__(self, budget: Budget, max_message_bytes: int, receive_s: float) -> None:
        self.budget, self.receive_s = budget, receive_s
        self._max_bytes = max_message_bytes
        self._pending: dict[Context, _Terms] = {}
        self._looks = 0
        self._late: dict[Context, _Late] = {}
        self._connections: dict[str, _Connection] = {}
        self._sockets = TcpConnections()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._scanned = -math.inf
        """When the sockets were looked for last, on the monotonic clock."""
        self._uncounted = 0
        """Bytes charged in this look on sockets that count none."""
        self._decompressing = asyncio.Semaphore(_DECOMPRESSIONS)

    @property
    def pending(self) -> int:
        """Messages that are waited for."""
        return len(self._pending)

    def begin(self, context: Context, caller: str | None, reject: Reject) -> None:
        """Note that the message of a unary call is waited for; ``read`` does all of it.

        Args:
            context: of the call.
            caller: name of the token it showed; None where its connection is the caller.
            reject: called if the message has to give way or is too late. Then waiting for it raises
                ``grpc.aio.AbortError``.
        """
        self._pending[context] = caller, reject, self.receive_s, self._looks, None
        if self._timer is None:
            self._look_in(_LOOK_S)

    def end(self, context: Context, size: int) -> None:
        """Note that it is there, with ``size`` bytes, or will not come."""
        terms = self._pending.pop(context, None)
        if terms is not None and (self._connections or self._late):
            self._deliver(context, size, terms[4])

    async def read(
        self,
        context: Context,
        caller: str | None,
        reject: Reject,
        limit_s: float | None,
        peer: str | None = None,
    ) -> bytes | None:
        """Return the next message of a call; None where there is none.

        Args:
            context: as of ``begin``.
            caller: as of ``begin``.
            reject: as of ``begin``.
            limit_s: how long the message may take; None for any time.
            peer: of the call, where its handler may end before this does.

        Raises:
            grpc.aio.AbortError: The message was rejected; the call has ended by then.
        """
        self.begin(context, caller, reject)
        self._pending[context] = caller, reject, limit_s, self._looks, peer
        size = 0
        try:
            message = await context.read()
            data = None if message is grpc.aio.EOF else message
            size = len(data or b"")
        finally:
            self.end(context, size)
        check_cancelled()
        return data

    async def decompressed(self, caller: str, data: bytes, max_bytes: int) -> bytes:
        """Return a message for which ``is_large_gzip``, decompressed off the event loop.

        One that cannot be is cut short, for whoever parses it to reject.

        Args:
            caller: holds the memory meanwhile.
            data: the message.
            max_bytes: of it, decompressed.

        Raises:
            QueueFullError: There is no room for as much as it may become.
        """
        holding = self.hold(caller, max(len(data), min(announced_bytes(data), max_bytes)))
        try:
            await self._decompressing.acquire()
        except BaseException:
            self.budget.release(holding)
            raise
        work = asyncio.get_running_loop().run_in_executor(None, inflated, data, max_bytes)

        def done(_: object) -> None:
            self.budget.release(holding)
            self._decompressing.release()

        # The thread goes on where the caller has left; until it ends it holds its memory.
        work.add_done_callback(done)
        try:
            return await asyncio.shield(work)
        except MessageStructureError:
            return data[:_HEAD_BYTES]

    def hold(self, caller: str, size: int) -> Holding:
        """Return the holding of a message over ``LARGE_BYTES``, to be released with its answer.

        Raises:
            QueueFullError: There is no room for it.
        """
        holding = self.budget.reserve(caller, _WHOLE * size)
        if holding is None:
            raise self._full(f"a message of {size} bytes")
        return holding

    def hold_until_sent(self, holding: Holding, task: asyncio.Task[Any], peer: str) -> None:
        """Keep a holding until the answer of a call has left.

        An answer that its caller does not read cannot be taken back from gRPC. If others need the
        memory, its connection is ended.

        Args:
            holding: released at the end of the task.
            task: of the call.
            peer: of the call.
        """

        def evict() -> None:
            _log.warning("connection ended: its answers are not read", extra={"peer": peer})
            shut_down(peer)

        timer = asyncio.get_running_loop().call_later(
            _UNREAD_S, self.budget.allow_eviction, holding, evict, context=_NO_VARIABLES
        )

        def sent(_: object) -> None:
            timer.cancel()
            self.budget.release(holding)

        task.add_done_callback(sent, context=_NO_VARIABLES)

    def close(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
        self._connections.clear()

    def _full(self, what: str) -> QueueFullError:
        budget = self.budget
        return QueueFullError(
            f"no room for {what}: messages, queues and trajectories of all callers hold "
            f"{budget.used:.0f} of {budget.capacity:.0f} bytes",
            retry_after_s=_RETRY_S,
        )

    def track(self, peer: str) -> None:
        """Count a connection's bytes from the beginning of a stream: it may wait for long."""
        if peer not in self._connections:
            self._connections[peer] = _Connection(0, time.monotonic())

    def _look_in(self, seconds: float) -> None:
        # Without the variables of the call that happens to be the current one.
        self._timer = asyncio.get_running_loop().call_later(
            seconds, self._look, context=_NO_VARIABLES
        )

    def _look(self) -> None:
        """Account for what has arrived of messages that are late, and plan the next look."""
        now = time.monotonic()
        try:
            self._account_all(now)
        except Exception:
            # The next look has to come: it enforces limits of time and memory.
            _log.exception("accounting of messages that are being received")
        self._timer = None
        if self._pending or self._connections:
            self._look_in(max(_LOOK_S, (time.monotonic() - now) / _LOOK_SHARE))

    def _account_all(self, now: float) -> None:
        for connection in self._connections.values():
            connection.late.clear()
        for context, terms in list(self._pending.items()):
            if terms[3] < self._looks:
                self._note_late(context, terms, now)
        self._looks += 1
        late = [each for each in self._connections.values() if each.late]
        if any(each.base is None for each in late) or (late and now - self._scanned > _SCAN_S):
            self._sockets.scan()
            self._scanned = now
        self._uncounted = 0
        for peer, connection in list(self._connections.items()):
            if connection.late:
                connection.idle_since = now
                self._account(peer, connection, now)
            elif now - connection.idle_since > _FORGET_S:
                del self._connections[peer]
            else:
                connection.settle(self._sockets.received(peer))

    def _note_late(self, context: Context, terms: _Terms, now: float) -> None:
        late = self._late.get(context)
        if late is None:
            late = self._late[context] = _Late(context, terms, now)
        if late.limit_s is not None and now - late.since > late.limit_s:
            text = f"the message did not arrive within {late.limit_s:g} s"
            self._reject(late, DeadlineExceededError(text))
        if not late.rejected:
            connection = self._connections.get(late.peer)
            if connection is None:
                connection = self._connections[late.peer] = _Connection(_UNSEEN_BYTES, now)
            connection.late.append(late)

    def _account(self, peer: str, connection: _Connection, now: float) -> None:
        received = self._sockets.received(peer)
        if received is None:
            sizes = [self._possible(late, now) for late in connection.late]
        else:
            unfinished = connection.unfinished(received, now)
            sizes = [min(self._max_bytes, unfinished // len(connection.late))] * len(
                connection.late
            )
        for late, size in zip(connection.late, sizes, strict=True):
            if not late.rejected and not self._resize(late, size):
                self._reject(late, self._full("a message that is being received"))

    def _possible(self, late: _Late, now: float) -> int:
        """Return the bytes that a message may have received on a socket that counts none.

        Those of the file system do not. Together they are charged half of the budget at most; the
        rest is charged more than there is room for, and so rejected.
        """
        if late.limit_s is None:
            return 0
        looks = min(int((now - late.since) / _LOOK_S), _DOUBLINGS)
        size = min(self._max_bytes, LARGE_BYTES << looks)
        self._uncounted += size
        fits = 2 * self._uncounted <= self.budget.capacity
        return size if fits else math.ceil(self.budget.capacity) + 1

    def _resize(self, late: _Late, size: int) -> bool:
        if late.holding is not None:
            return self.budget.resize(late.holding, size)
        late.holding = self.budget.reserve(late.caller, size, partial(self._evict, late))
        return late.holding is not None

    def _evict(self, late: _Late) -> None:
        self._reject(late, self._full("a message that is being received"))

    def _reject(self, late: _Late, error: ElsError) -> None:
        if not late.rejected:
            late.rejected = True
            variables = contextvars.Context()
            if late.token is not None:
                variables.run(set_token_name, late.token)
            loop = asyncio.get_running_loop()
            task = loop.create_task(self._end(late, error), context=variables)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _end(self, late: _Late, error: ElsError) -> None:
        if self._late.get(late.context) is not late:
            return  # the message is there after all, and its call under way
        try:
            await late.reject(late.context, error)
        except (grpc.aio.AbortError, grpc.aio.UsageError, asyncio.CancelledError):
            return  # as it should, or the call has ended by itself

    def _deliver(self, context: Context, size: int, peer: str | None) -> None:
        late = self._late.pop(context, None)
        charged = 0
        if late is not None and late.holding is not None:
            charged = round(late.holding.amount)
            self.budget.release(late.holding)
        connection = self._connections.get(late.peer if late else peer or context.peer())
        if connection is not None:
            # What was received of a message that does not come any more is no part of the next.
            connection.deliver(size or charged)
