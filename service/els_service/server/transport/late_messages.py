"""Periodic accounting of messages that are awaited and have not arrived completely.

A message that is complete when it is read never appears here. Every 10 ms the scan charges the
bytes that a connection received and did not deliver to the callers of its late messages. If the
budget is exhausted, the newest message of the caller that holds most is rejected.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import time
from functools import partial

import grpc

from els_service.engine.budget import Holding
from els_service.errors import DeadlineExceededError, ElsError
from els_service.server.transport.call_context import set_token_name
from els_service.server.transport.connections import LARGE_BYTES, Connection
from els_service.server.transport.grpc_types import Context, Reject
from els_service.server.transport.message_memory import MessageMemory
from els_service.server.transport.tcp_info import TcpConnections

SCAN_S = 0.01
"""Time between two scans."""
_DOUBLINGS = 10
_SCAN_SHARE = 0.05
"""Maximum share of the event loop's time that scans take."""
_UNSEEN_BYTES = 8 << 20
"""Maximum bytes that a message may have received before its first scan: 20 ms at 3 Gbit/s."""
_SOCKETS_S = 1.0
"""Time between searches for further sockets of a peer while one of its messages is late."""
_FORGET_S = 10.0
"""Time without late messages after which a connection is forgotten."""

_log = logging.getLogger(__name__)
_NO_VARIABLES = contextvars.Context()

Awaited = tuple[str | None, Reject, float | None, int, str | None]
"""Awaited message: token name, rejection, time limit (None: unlimited), number of scans before it
was awaited, and peer.

The peer is None if the call's handler itself awaits the message. Then the call exists for as long
as the message is awaited, and its context may be used; using the context of a call that has ended
crashes the process.
"""


class LateMessage:
    """Awaited message that had not arrived at two scans."""

    __slots__ = (
        *("caller", "context", "holding", "limit_s", "peer"),
        *("reject", "rejected", "since", "token"),
    )

    def __init__(self, context: Context, awaited: Awaited, now: float) -> None:
        self.context, (self.token, self.reject, self.limit_s, _, peer) = context, awaited
        self.peer: str = peer or context.peer()
        self.caller = self.token or self.peer
        self.since = now
        self.holding: Holding | None = None
        self.rejected = False


class LateMessages:
    """Time limits and memory reservations of late messages.

    Args:
        memory: has the budget that they are charged to.
        max_message_bytes: maximum size of one message, which gRPC enforces.

    Attributes:
        awaited: messages that are being awaited, by the context of their call.
        scans: number of scans so far.
        timer: of the next scan; None if none is scheduled.
        connections: with a late message or a stream, by peer.
        late: late messages by the context of their call.
    """

    def __init__(self, memory: MessageMemory, max_message_bytes: int) -> None:
        self.awaited: dict[Context, Awaited] = {}
        self.scans = 0
        self.timer: asyncio.TimerHandle | None = None
        self.connections: dict[str, Connection] = {}
        self.late: dict[Context, LateMessage] = {}
        self._memory, self._max_bytes = memory, max_message_bytes
        self._sockets = TcpConnections()
        self._sockets_found = -math.inf
        """When sockets were last searched, on the monotonic clock."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._uncounted = 0
        """Bytes charged in this scan for sockets without a byte count."""

    def schedule(self, seconds: float = SCAN_S) -> None:
        """Schedule the next scan, outside of the context of the current call."""
        self.timer = asyncio.get_running_loop().call_later(
            seconds, self._scan, context=_NO_VARIABLES
        )

    def track(self, peer: str) -> None:
        """Count the bytes of a connection from the start of a stream, which may be idle."""
        if peer not in self.connections:
            self.connections[peer] = Connection(0, time.monotonic())

    def deliver(self, context: Context, size: int, peer: str | None) -> None:
        """Release what a message held that has arrived, or never will.

        Args:
            context: of its call.
            size: in bytes; 0 if it did not arrive.
            peer: as of ``Awaited``.
        """
        late = self.late.pop(context, None)
        charged = 0
        if late is not None and late.holding is not None:
            charged = round(late.holding.amount)
            self._memory.budget.release(late.holding)
        connection = self.connections.get(late.peer if late else peer or context.peer())
        if connection is not None:
            # The bytes of an abandoned message are not part of the next one.
            connection.deliver(size or charged)

    def close(self) -> None:
        """Stop scanning."""
        if self.timer is not None:
            self.timer.cancel()
        self.connections.clear()

    def _scan(self) -> None:
        now = time.monotonic()
        try:
            self._account_all(now)
        except Exception:
            # The next scan must run: it enforces the limits of time and memory.
            _log.exception("accounting of late messages failed")
        self.timer = None
        if self.awaited or self.connections:
            self.schedule(max(SCAN_S, (time.monotonic() - now) / _SCAN_SHARE))

    def _account_all(self, now: float) -> None:
        by_peer = self._late_by_peer(now)
        self.scans += 1
        fresh = any(self.connections[peer].base is None for peer in by_peer)
        if fresh or (by_peer and now - self._sockets_found > _SOCKETS_S):
            self._sockets.scan()
            self._sockets_found = now
        self._uncounted = 0
        for peer, connection in list(self.connections.items()):
            if late := by_peer.get(peer):
                connection.idle_since = now
                self._account(peer, connection, late, now)
            elif now - connection.idle_since > _FORGET_S:
                del self.connections[peer]
            else:
                connection.settle(self._sockets.received(peer))

    def _late_by_peer(self, now: float) -> dict[str, list[LateMessage]]:
        """Return the late messages that are not rejected; reject those over their time limit."""
        by_peer: dict[str, list[LateMessage]] = {}
        for context, awaited in list(self.awaited.items()):
            if awaited[3] == self.scans:
                continue  # awaited since the previous scan
            late = self.late.get(context)
            if late is None:
                late = self.late[context] = LateMessage(context, awaited, now)
            if late.limit_s is not None and now - late.since > late.limit_s:
                text = f"the message did not arrive within {late.limit_s:g} s"
                self._reject(late, DeadlineExceededError(text))
            if not late.rejected:
                if late.peer not in self.connections:
                    self.connections[late.peer] = Connection(_UNSEEN_BYTES, now)
                by_peer.setdefault(late.peer, []).append(late)
        return by_peer

    def _account(
        self, peer: str, connection: Connection, messages: list[LateMessage], now: float
    ) -> None:
        received = self._sockets.received(peer)
        if received is None:
            sizes = [self._possible_bytes(late, now) for late in messages]
        else:
            late_s = now - min(late.since for late in messages)
            unfinished = connection.unfinished(received, late_s)
            sizes = [min(self._max_bytes, unfinished // len(messages))] * len(messages)
        for late, size in zip(messages, sizes, strict=True):
            if not late.rejected and not self._resize(late, size):
                self._evict(late)

    def _possible_bytes(self, late: LateMessage, now: float) -> int:
        """Return the bytes that a message may have received on a socket without a byte count.

        Unix sockets have none. All such messages are charged at most half of the budget; a further
        one is charged more than the budget and therefore rejected.
        """
        if late.limit_s is None:
            return 0
        scans = min(int((now - late.since) / SCAN_S), _DOUBLINGS)
        size = min(self._max_bytes, LARGE_BYTES << scans)
        self._uncounted += size
        capacity = self._memory.budget.capacity
        return size if 2 * self._uncounted <= capacity else math.ceil(capacity) + 1

    def _resize(self, late: LateMessage, size: int) -> bool:
        budget = self._memory.budget
        if late.holding is not None:
            return budget.resize(late.holding, size)
        late.holding = budget.reserve(late.caller, size, partial(self._evict, late))
        return late.holding is not None

    def _evict(self, late: LateMessage) -> None:
        self._reject(late, self._memory.exhausted("a message that is being received"))

    def _reject(self, late: LateMessage, error: ElsError) -> None:
        if not late.rejected:
            late.rejected = True
            variables = contextvars.Context()
            if late.token is not None:
                variables.run(set_token_name, late.token)
            loop = asyncio.get_running_loop()
            task = loop.create_task(self._end_call(late, error), context=variables)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _end_call(self, late: LateMessage, error: ElsError) -> None:
        if self.late.get(late.context) is not late:
            return  # the message has arrived in the meantime, and its call has begun
        try:
            await late.reject(late.context, error)
        except (grpc.aio.AbortError, grpc.aio.UsageError, asyncio.CancelledError):
            return  # the abort succeeded, or the call had ended before
