"""A stream of requests answered in order, several of them under way at once."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.errors import ElsError, UnavailableError
from els_service.wire.batches import check_cancelled
from els_service.wire.calls import status_of
from els_service.wire.envelopes import DenoiseEnvelope
from els_service.wire.kept import Recognised

_log = logging.getLogger(__name__)

WINDOW = 64
"""Requests of one stream under way; beyond it the stream is not read, and its caller waits."""
_SHARE = 1 << 20
"""Bytes that one of them may hold; one that holds more leaves room for fewer. So a stream whose
caller does not read its answers holds ``WINDOW * _SHARE`` bytes, and the request read last."""

Answer = pb.DenoiseStreamResponse
Begun = asyncio.Queue[tuple[Answer | asyncio.Future[Answer], int] | None]
"""Answers, each with the room that its request took; None where there is no other."""
Request = pb.DenoiseRequest | Recognised[DenoiseEnvelope]
Begin = Callable[[Request], Answer | Awaitable[Answer]]


async def in_order(
    requests: AsyncIterator[Request], begin: Begin, draining: asyncio.Event
) -> AsyncIterator[Answer]:
    """Yield one answer for each request, in order; what fails is answered with its error.

    Args:
        requests: read as answers are taken.
        begin: returns an answer or the answer to come, or raises.
        draining: once it is set no more is read, what was read is answered, and the stream ends.

    Raises:
        UnavailableError: It ended because the server drains, before the caller had ended it.
    """
    begun: Begun = asyncio.Queue()
    room = asyncio.Semaphore(WINDOW)
    reader = asyncio.ensure_future(_read(requests, begin, begun, room))
    drain = asyncio.ensure_future(_end_at(draining, reader, begun))
    try:
        while (oldest := await begun.get()) is not None:
            answer, size = oldest
            yield answer if isinstance(answer, Answer) else await _settled(answer)
            for _ in range(size):
                room.release()
        # While it waits for a request it cannot be stopped.
        if not reader.done() or reader.cancelled():
            raise UnavailableError("the server is draining; send the rest to another")
        reader.result()
    finally:
        for task in (drain, reader):
            task.cancel()
        # A request that it waits for it waits for until the call ends; how that ends is known here.
        reader.add_done_callback(_forget)
        while not begun.empty():
            left = begun.get_nowait()
            if left is not None and isinstance(left[0], asyncio.Future):
                left[0].cancel()


async def _read(
    requests: AsyncIterator[Request],
    begin: Begin,
    begun: Begun,
    room: asyncio.Semaphore,
) -> None:
    try:
        # Before a request is read: one that was read is answered, whenever the reading ends.
        await room.acquire()
        async for request in requests:
            check_cancelled()
            try:
                answer = begin(request)
            except Exception as error:
                answer = _failed(error)
            ready = answer if isinstance(answer, Answer) else asyncio.ensure_future(answer)
            size = min(WINDOW, 1 + _held(request, ready) // _SHARE)
            begun.put_nowait((ready, size))
            for _ in range(size):
                await room.acquire()
    finally:
        begun.put_nowait(None)


async def _end_at(draining: asyncio.Event, reader: asyncio.Task[None], begun: Begun) -> None:
    await draining.wait()
    reader.cancel()
    begun.put_nowait(None)


def _forget(reader: asyncio.Task[None]) -> None:
    """Take what a task raised, which would else be logged as an error."""
    if not reader.cancelled():
        reader.exception()


async def _settled(answer: asyncio.Future[Answer]) -> Answer:
    try:
        return await answer
    except Exception as error:
        return _failed(error)


def _held(request: Request, answer: Answer | asyncio.Future[Answer]) -> int:
    """Return how many bytes a request and its answer hold at most, until the answer is taken."""
    if isinstance(answer, Answer):
        return answer.ByteSize()
    # Of each pixel what is asked and answered in float32; then the answer alone, which has as much
    # evidence as pixels at most. The request holds pixels no more.
    if isinstance(request, Recognised):
        return 8 * request.envelope.blank.pixels.size
    return request.ByteSize() + 8 * math.prod(request.x.shape)


def _failed(error: Exception) -> Answer:
    if not isinstance(error, ElsError):
        _log.error("stream", exc_info=error)
    # Its frames know the request, and it them: they would stay until garbage is collected.
    error.__traceback__ = None
    return Answer(error=status_of(error))
