"""Bidirectional streams with ordered responses and several requests in progress."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.engine.budget import Budget, Holding
from els_service.errors import ElsError, QueueFullError, UnavailableError
from els_service.server.transport.grpc_types import Response
from els_service.server.transport.status import status_of

_log = logging.getLogger(__name__)

WINDOW = 64
"""Maximum requests of one stream in progress; at the maximum the stream is not read."""
_SHARE = 1 << 20
"""Bytes per place in the window; a larger request takes several places. So a stream whose responses
are not read holds at most ``WINDOW * _SHARE`` bytes and its latest request."""
_FREE_BYTES = 1 << 20
"""Bytes of a stream that are not charged to the budget of all callers."""
_RETRY_S = 1.0
_UNREAD_S = 1.0
"""Time after which the connection of an evicted stream is closed if its client reads nothing."""

Pending = asyncio.Queue[tuple[Response | asyncio.Future[Response], int] | None]
"""Responses, each with the bytes that its request holds; None ends the stream."""
Request = pb.DenoiseRequest
Begin = Callable[[Request], Response | Awaitable[Response]]


class Window:
    """Requests of one stream in progress, and the memory that they hold.

    Args:
        budget: of all callers, in bytes.
        caller: of the stream.
        disconnect: closes the connection of the stream.
    """

    def __init__(
        self, budget: Budget, caller: str, disconnect: Callable[[], None] = lambda: None
    ) -> None:
        self._budget, self._caller, self._disconnect = budget, caller, disconnect
        self._disconnecting: asyncio.TimerHandle | None = None
        self.evicted = asyncio.Event()
        """Set when other callers need the memory of the stream, which then ends."""
        self._places = asyncio.Semaphore(WINDOW)
        self._holding: Holding | None = None
        self._held = 0

    async def enter(self, places: int = 1) -> None:
        """Acquire places in the window, waiting until they are free."""
        for _ in range(places):
            await self._places.acquire()

    def hold(self, size: int) -> None:
        """Charge ``size`` bytes of a request.

        Raises:
            QueueFullError: The budget is exhausted.
        """
        if self.evicted.is_set() or not self._fits(self._held + size):
            raise exhausted(f"{size} bytes of a stream")
        self._held += size

    def leave(self, size: int) -> None:
        """Release the bytes and places of a request that held ``size`` bytes."""
        self._held -= size
        if self._holding is not None:
            self._fits(self._held)
        for _ in range(_places(size)):
            self._places.release()

    def close(self) -> None:
        """Release everything."""
        if self._holding is not None:
            self._budget.release(self._holding)
        if self._disconnecting is not None:
            self._disconnecting.cancel()

    def _fits(self, held: int) -> bool:
        excess = max(0, held - _FREE_BYTES)
        if self._holding is not None:
            return self._budget.resize(self._holding, excess)
        if excess:
            self._holding = self._budget.reserve(self._caller, excess, self._evict)
        return not excess or self._holding is not None

    def _evict(self) -> None:
        self.evicted.set()
        # gRPC cannot withdraw a response that is not read, nor otherwise end its stream.
        loop = asyncio.get_running_loop()
        self._disconnecting = loop.call_later(_UNREAD_S, self._disconnect)


def exhausted(what: str) -> QueueFullError:
    """Return the error for ``what``, which exceeds the budget of all callers."""
    text = f"no memory for {what}: all callers together hold the budget"
    return QueueFullError(text, retry_after_s=_RETRY_S)


async def in_order(
    requests: AsyncIterator[Request], begin: Begin, draining: asyncio.Event, window: Window
) -> AsyncIterator[Response]:
    """Yield one response per request, in order; a failed request yields its error.

    Args:
        requests: read as responses are consumed.
        begin: returns a response or an awaitable of one, or raises.
        draining: when set, no further request is read, and the stream ends after the responses to
            those that were read.
        window: of this stream.

    Raises:
        UnavailableError: The server drains, and the client had not ended the stream.
        QueueFullError: The stream was evicted.
    """
    pending: Pending = asyncio.Queue()
    reader = asyncio.ensure_future(_read(requests, begin, pending, window))
    ending = [
        asyncio.ensure_future(_end_at(draining, reader, pending)),
        asyncio.ensure_future(_drop_at(window.evicted, reader, pending)),
    ]
    try:
        while (oldest := await pending.get()) is not None:
            response, size = oldest
            yield await _settled(response) if isinstance(response, asyncio.Future) else response
            window.leave(size)
        if window.evicted.is_set():
            raise exhausted("a stream")
        # A reader that awaits a request cannot be stopped.
        if not reader.done() or reader.cancelled():
            raise UnavailableError(
                "the server is draining; send the remaining requests to another replica"
            )
        reader.result()
    finally:
        for task in (*ending, reader):
            task.cancel()
        # A reader that awaits a request ends with the call; its exception is handled here.
        reader.add_done_callback(_retrieve)
        _drop(pending)
        window.close()


async def _read(
    requests: AsyncIterator[Request],
    begin: Begin,
    pending: Pending,
    window: Window,
) -> None:
    try:
        # Before reading: each request that was read gets a response, whenever reading ends.
        await window.enter()
        async for request in requests:
            # Before computing: a request that exceeds the budget is not computed.
            size = _held(request)
            try:
                window.hold(size)
            except QueueFullError as error:
                ready: Response | asyncio.Future[Response] = _failed(error)
                size = 0
            else:
                ready = _begin(begin, request)
            pending.put_nowait((ready, size))
            del request
            await window.enter(_places(size))
    finally:
        pending.put_nowait(None)


def _begin(begin: Begin, request: Request) -> Response | asyncio.Future[Response]:
    try:
        response = begin(request)
    except Exception as error:
        return _failed(error)
    return asyncio.ensure_future(response) if isinstance(response, Awaitable) else response


async def _end_at(draining: asyncio.Event, reader: asyncio.Task[None], pending: Pending) -> None:
    await draining.wait()
    reader.cancel()
    pending.put_nowait(None)


async def _drop_at(evicted: asyncio.Event, reader: asyncio.Task[None], pending: Pending) -> None:
    await evicted.wait()
    reader.cancel()
    _drop(pending)
    pending.put_nowait(None)


def _drop(pending: Pending) -> None:
    """Cancel and drop the requests in progress."""
    while not pending.empty():
        item = pending.get_nowait()
        if item is not None and isinstance(item[0], asyncio.Future):
            item[0].cancel()


def _retrieve(reader: asyncio.Task[None]) -> None:
    """Retrieve the exception of a task, which asyncio would otherwise log as an error."""
    if not reader.cancelled():
        reader.exception()


async def _settled(response: asyncio.Future[Response]) -> Response:
    try:
        return await response
    except Exception as error:
        return _failed(error)


def _places(size: int) -> int:
    return min(WINDOW, 1 + size // _SHARE)


def _held(request: Request) -> int:
    """Return the maximum bytes of a request and its response, until the response is consumed."""
    if not isinstance(request, pb.DenoiseRequest):
        return 0  # malformed
    # Eight bytes per pixel: float32 of request and response while it is computed; then of response
    # and evidence, which has at most as many elements. A shape with more pixels than the message
    # has bytes is rejected.
    size = request.ByteSize()
    return size + 8 * max(0, min(math.prod(request.x.shape[:4]), size))


def _failed(error: Exception) -> Response:
    if not isinstance(error, ElsError):
        _log.error("stream", exc_info=error)
    # Its frames reference the request and the error: a cycle until the next garbage collection.
    error.__traceback__ = None
    return pb.DenoiseStreamResponse(error=status_of(error))
