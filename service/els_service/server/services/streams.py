"""Bidirectional streams answered in order, with several requests under way."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.engine.budget import Budget, Holding
from els_service.errors import ElsError, QueueFullError, UnavailableError
from els_service.server.transport.grpc_types import Response
from els_service.server.transport.grpc_workarounds import check_cancelled
from els_service.server.transport.status import status_of

_log = logging.getLogger(__name__)

WINDOW = 64
"""Requests of one stream under way; beyond it the stream is not read, and its caller waits."""
_SHARE = 1 << 20
"""Bytes that one of them may hold; one that holds more leaves room for fewer. So a stream whose
caller does not read its answers holds ``WINDOW * _SHARE`` bytes, and the request read last."""
_FREE_BYTES = 1 << 20
"""What a stream holds beyond this counts in the budget of all callers."""
_RETRY_S = 1.0
_UNREAD_S = 1.0
"""After that a stream that was evicted, and whose caller reads nothing, loses its connection."""

Begun = asyncio.Queue[tuple[Response | asyncio.Future[Response], int] | None]
"""Answers, each with the bytes that its request holds; None where there is no other."""
Request = pb.DenoiseRequest
Begin = Callable[[Request], Response | Awaitable[Response]]


class Window:
    """Requests of one stream that are under way, and the memory that they hold.

    Args:
        budget: of all callers, in bytes.
        caller: whose stream it is.
        disconnect: ends the stream's connection.
    """

    def __init__(
        self, budget: Budget, caller: str, disconnect: Callable[[], None] = lambda: None
    ) -> None:
        self._budget, self._caller, self._disconnect = budget, caller, disconnect
        self._disconnecting: asyncio.TimerHandle | None = None
        self.evicted = asyncio.Event()
        """Set once the stream has to end, as others need its memory."""
        self._room = asyncio.Semaphore(WINDOW)
        self._holding: Holding | None = None
        self._held = 0

    async def enter(self, requests: int = 1) -> None:
        """Wait until there is room for so many requests, and take it."""
        for _ in range(requests):
            await self._room.acquire()

    def hold(self, size: int) -> None:
        """Note that a request holds ``size`` bytes.

        Raises:
            QueueFullError: There is no room for them in the budget.
        """
        if self.evicted.is_set() or not self._fits(self._held + size):
            raise no_room(f"{size} bytes of a stream")
        self._held += size

    def leave(self, size: int) -> None:
        """Give the room of a request that held ``size`` bytes back."""
        self._held -= size
        self._fits(self._held)
        for _ in range(_places(size)):
            self._room.release()

    def close(self) -> None:
        """Give everything back."""
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
        # An answer that is not read cannot be taken back, nor its stream ended otherwise.
        loop = asyncio.get_running_loop()
        self._disconnecting = loop.call_later(_UNREAD_S, self._disconnect)


def no_room(what: str) -> QueueFullError:
    """Return the error of a stream for whose memory there is no room."""
    text = f"no room for {what} beside what all callers hold"
    return QueueFullError(text, retry_after_s=_RETRY_S)


async def in_order(
    requests: AsyncIterator[Request], begin: Begin, draining: asyncio.Event, window: Window
) -> AsyncIterator[Response]:
    """Yield one answer for each request, in order; what fails is answered with its error.

    Args:
        requests: read as answers are taken.
        begin: returns an answer or the answer to come, or raises.
        draining: once it is set no more is read, what was read is answered, and the stream ends.
        window: of this stream.

    Raises:
        UnavailableError: It ended because the server drains, before the caller had ended it.
        QueueFullError: It ended because others need the memory that it holds.
    """
    begun: Begun = asyncio.Queue()
    reader = asyncio.ensure_future(_read(requests, begin, begun, window))
    ending = [
        asyncio.ensure_future(_end_at(draining, reader, begun)),
        asyncio.ensure_future(_drop_at(window.evicted, reader, begun)),
    ]
    try:
        while (oldest := await begun.get()) is not None:
            answer, size = oldest
            yield await _settled(answer) if isinstance(answer, asyncio.Future) else answer
            window.leave(size)
        if window.evicted.is_set():
            raise no_room("a stream")
        # While it waits for a request it cannot be stopped.
        if not reader.done() or reader.cancelled():
            raise UnavailableError("the server is draining; send the rest to another")
        reader.result()
    finally:
        for task in (*ending, reader):
            task.cancel()
        # A request that it waits for it waits for until the call ends; how that ends is known here.
        reader.add_done_callback(_forget)
        _drop(begun)
        window.close()


async def _read(
    requests: AsyncIterator[Request],
    begin: Begin,
    begun: Begun,
    window: Window,
) -> None:
    try:
        # Before a request is read: one that was read is answered, whenever the reading ends.
        await window.enter()
        async for request in requests:
            check_cancelled()
            # Before it is begun: what has no room is not computed.
            size = _held(request)
            try:
                window.hold(size)
            except QueueFullError as error:
                ready: Response | asyncio.Future[Response] = _failed(error)
                size = 0
            else:
                ready = _begin(begin, request)
            begun.put_nowait((ready, size))
            del request
            await window.enter(_places(size))
    finally:
        begun.put_nowait(None)


def _begin(begin: Begin, request: Request) -> Response | asyncio.Future[Response]:
    try:
        answer = begin(request)
    except Exception as error:
        return _failed(error)
    return asyncio.ensure_future(answer) if isinstance(answer, Awaitable) else answer


async def _end_at(draining: asyncio.Event, reader: asyncio.Task[None], begun: Begun) -> None:
    await draining.wait()
    reader.cancel()
    begun.put_nowait(None)


async def _drop_at(evicted: asyncio.Event, reader: asyncio.Task[None], begun: Begun) -> None:
    await evicted.wait()
    reader.cancel()
    _drop(begun)
    begun.put_nowait(None)


def _drop(begun: Begun) -> None:
    """Cancel and drop what is under way."""
    while not begun.empty():
        left = begun.get_nowait()
        if left is not None and isinstance(left[0], asyncio.Future):
            left[0].cancel()


def _forget(reader: asyncio.Task[None]) -> None:
    """Take what a task raised, which would else be logged as an error."""
    if not reader.cancelled():
        reader.exception()


async def _settled(answer: asyncio.Future[Response]) -> Response:
    try:
        return await answer
    except Exception as error:
        return _failed(error)


def _places(size: int) -> int:
    return min(WINDOW, 1 + size // _SHARE)


def _held(request: Request) -> int:
    """Return how many bytes a request and its answer hold at most, until the answer is taken."""
    if not isinstance(request, pb.DenoiseRequest):
        return 0  # its bytes were none
    # Of each pixel what is asked and answered in float32; then the answer alone, which has as much
    # evidence as pixels at most. A shape of more pixels than there are bytes is rejected.
    size = request.ByteSize()
    return size + 8 * max(0, min(math.prod(request.x.shape[:4]), size))


def _failed(error: Exception) -> Response:
    if not isinstance(error, ElsError):
        _log.error("stream", exc_info=error)
    # Its frames know the request, and it them: they would stay until garbage is collected.
    error.__traceback__ = None
    return pb.DenoiseStreamResponse(error=status_of(error))
