"""Service ``grpc.health.v1.Health``: status of each service, by request or watch.

Each watcher is woken by an event of its own and is sent the latest status only; one that does not
take an answer delays nobody but itself and those on its connection.
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
from els_service.server.transport.grpc_types import Context
from els_service.server.transport.grpc_workarounds import check_cancelled
from els_service.server.transport.small_messages import SMALL_MESSAGE_BYTES, UNREADABLE

_log = logging.getLogger(__name__)

Status = int
"""A ``HealthCheckResponse.ServingStatus``."""

_TAKEN_WITHIN_S = 5.0
"""A watcher whose peer leaves no room for an answer for this long is dropped."""
WRITES_OF_PEER = 4
"""Answers on their way to one connection at once."""
_STALLED = f"watchers: expected room for an answer within {_TAKEN_WITHIN_S:g} s, got none"
_LISTED = 1000
"""Services that one answer may list."""

_Response = health_pb2.HealthCheckResponse
_lists: Any = health_pb2
"""The same; the stubs do not know the messages of List."""


class HealthService(HealthServicer):
    """Health checks at one port.

    Args:
        statuses: by service; may change at any time.
        watchers: of this port; are woken when they change.
    """

    def __init__(self, statuses: Mapping[str, Status], watchers: Watchers) -> None:
        self._statuses, self._watchers = statuses, watchers
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """Return a service's status; NOT_FOUND where there is no such service."""
        status = self._statuses.get(request.service)
        if status is None:
            got = ascii(request.service[:100])
            text = f"service: expected a service or a model of this server, got {got}"
            await context.abort(StatusCode.NOT_FOUND, text)
        return _Response(status=status)

    async def List(self, request: object, context: Context) -> Any:
        """Return the status of every service; RESOURCE_EXHAUSTED where there are too many."""
        if (count := len(self._statuses)) > _LISTED:
            text = f"services: expected at most {_LISTED} to list, got {count}"
            await context.abort(StatusCode.RESOURCE_EXHAUSTED, text)
        statuses = {name: _Response(status=status) for name, status in self._statuses.items()}
        return _lists.HealthListResponse(statuses=statuses)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        """Write a service's status at once and whenever it has changed.

        SERVICE_UNKNOWN where there is no such service, which may change. Ends with
        RESOURCE_EXHAUSTED where there are too many watchers, with DEADLINE_EXCEEDED where the peer
        left no room for an answer for 5 s, and with INVALID_ARGUMENT where the request is none.
        """
        if request.service == UNREADABLE:
            # gRPC keeps its bytes as long as the call lasts.
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
        """Write what changes until the watcher is dropped."""
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
        # gRPC has no way to give up on a write: it ends when the peer makes room or its connection
        # ends, and so does the call. Hence few are begun at once on a connection; the others wait
        # here, from where a call can be ended. Where there is room a write takes no time.
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
            raise asyncio.CancelledError("the caller is gone") from error
        finally:
            timer.cancel()
            turn.release()
        check_cancelled()

    def _turn(self, peer: str) -> asyncio.Semaphore:
        """Return what the writes of a connection share; kept while one of them holds it."""
        turn = self._turns.get(peer)
        if turn is None:
            turn = asyncio.Semaphore(WRITES_OF_PEER)
            # Connections of a socket of the file system cannot be told apart.
            if not is_unix(peer):
                self._turns[peer] = turn
        return turn

    def _drop_stalled(self, watcher: Watcher) -> None:
        if not watcher.dropped:
            self._watchers.drop(watcher, _STALLED)
            record = {"peer": watcher.peer, "reason": _STALLED}
            _log.info("watcher of health dropped", extra=record)
