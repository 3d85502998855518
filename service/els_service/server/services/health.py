"""Service ``grpc.health.v1.Health``: status of each service, by request or watch.

Each watcher is woken by an event of its own and is sent the latest status only; one that does not
read a response delays only itself and others on its connection.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any
from weakref import WeakValueDictionary

import grpc
from grpc import StatusCode
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthServicer

from els_service.errors import ResourceExhaustedError
from els_service.server.addresses import is_unix
from els_service.server.services.health_watchers import Watcher, Watchers
from els_service.server.transport.call_context import check_cancelled
from els_service.server.transport.grpc_types import Context
from els_service.server.transport.small_messages import SMALL_MESSAGE_BYTES, UNREADABLE

_log = logging.getLogger(__name__)

Status = int
"""A ``HealthCheckResponse.ServingStatus``."""

_TAKEN_WITHIN_S = 5.0
"""Maximum time for which a watcher's peer may block a response; then the watcher is dropped."""
WRITES_OF_PEER = 4
"""Maximum responses that are being sent on one connection at once."""
_STALLED = f"watchers: expected each response to be read within {_TAKEN_WITHIN_S:g} s"
_LISTED = 1000
"""Maximum services in one response of ``List``."""

_Response = health_pb2.HealthCheckResponse
_lists: Any = health_pb2
"""The same module; its stubs lack the messages of ``List``."""


class HealthService(HealthServicer):
    """Health checks at one port.

    Args:
        statuses: by service; may change at any time.
        watchers: of this port; woken when a status changes.
    """

    def __init__(self, statuses: Mapping[str, Status], watchers: Watchers) -> None:
        self._statuses, self._watchers = statuses, watchers
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """Return the status of a service; NOT_FOUND if it is unknown."""
        status = self._statuses.get(request.service)
        if status is None:
            got = ascii(request.service[:100])
            text = f"service: expected a service or a model of this server, got {got}"
            await context.abort(StatusCode.NOT_FOUND, text)
        return _Response(status=status)

    async def List(self, request: object, context: Context) -> Any:
        """Return the status of each service; RESOURCE_EXHAUSTED if there are too many."""
        if (count := len(self._statuses)) > _LISTED:
            text = f"services: expected at most {_LISTED} to list, got {count}"
            await context.abort(StatusCode.RESOURCE_EXHAUSTED, text)
        statuses = {name: _Response(status=status) for name, status in self._statuses.items()}
        return _lists.HealthListResponse(statuses=statuses)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        """Write the status of a service at once and after each change.

        An unknown service is SERVICE_UNKNOWN until it is added. Ends with RESOURCE_EXHAUSTED if
        there are too many watchers, DEADLINE_EXCEEDED if the client has not read a response for
        5 s, and INVALID_ARGUMENT if the request is malformed.
        """
        if request.service == UNREADABLE:
            # gRPC keeps its bytes for the duration of the call.
            text = f"request: expected a message of at most {SMALL_MESSAGE_BYTES} bytes"
            await context.abort(StatusCode.INVALID_ARGUMENT, text)
        try:
            watcher = self._watchers.admit(request.service, context.peer())
        except ResourceExhaustedError as error:
            await context.abort(StatusCode.RESOURCE_EXHAUSTED, str(error))
        try:
            await self._follow(watcher, context)
            stalled = watcher.dropped == _STALLED
            code = StatusCode.DEADLINE_EXCEEDED if stalled else StatusCode.RESOURCE_EXHAUSTED
            await context.abort(code, watcher.dropped)
        finally:
            self._watchers.end(watcher)

    async def _follow(self, watcher: Watcher, context: Context) -> None:
        """Write changes of the status until the watcher is dropped."""
        sent: Status | None = None
        while not watcher.dropped:
            watcher.woken.clear()
            status = self._statuses.get(watcher.service, _Response.SERVICE_UNKNOWN)
            if status == sent:
                await watcher.woken.wait()
            else:
                await self._write(watcher, status, context)
                sent = status

    async def _write(self, watcher: Watcher, status: Status, context: Context) -> None:
        # gRPC cannot cancel a write: it ends when the client reads or disconnects, and the call not
        # before. So few are begun at once per connection; the others wait here, where their call
        # can be ended. If the client reads, a write takes no time.
        turn = self._turn(watcher.peer)
        try:
            async with asyncio.timeout(_TAKEN_WITHIN_S):
                await turn.acquire()
        except TimeoutError:
            self._drop_stalled(watcher)
            return
        loop = asyncio.get_running_loop()
        timer = loop.call_later(_TAKEN_WITHIN_S, self._drop_stalled, watcher)
        try:
            await context.write(_Response(status=status))
        except grpc.aio.BaseError as error:
            raise asyncio.CancelledError("the client has disconnected") from error
        finally:
            timer.cancel()
            turn.release()
        check_cancelled()

    def _turn(self, peer: str) -> asyncio.Semaphore:
        """Return the semaphore for writes on a connection; exists while one of them holds it."""
        turn = self._turns.get(peer)
        if turn is None:
            turn = asyncio.Semaphore(WRITES_OF_PEER)
            # All connections of a Unix socket have the same peer.
            if not is_unix(peer):
                self._turns[peer] = turn
        return turn

    def _drop_stalled(self, watcher: Watcher) -> None:
        if not watcher.dropped:
            self._watchers.drop(watcher, _STALLED)
            record = {"peer": watcher.peer, "reason": _STALLED}
            _log.info("health watcher dropped", extra=record)
