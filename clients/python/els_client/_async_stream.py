"""Stream of queries and their results in order, for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable
from contextlib import suppress
from typing import TypeAlias

import grpc

from els_client._channel import own_errors
from els_client._retries import RetryState
from els_client._stream import Call, PendingQueries, ended_early
from els_client._types import Images, Query
from els_client.errors import ElsError, UnavailableError
from els_proto.denoise.v1 import denoise_pb2 as pb

# Events: a response, the end of a stream, or (None) a change of the pending queries.
_Event: TypeAlias = pb.DenoiseStreamResponse | ElsError | None


class AsyncStream:
    """Three tasks and two queues: one task reads queries, one sends requests, one receives.

    The first task outlives a broken stream, because queries read from an iterator are not repeated.
    """

    def __init__(
        self,
        queries: Iterable[Query] | AsyncIterable[Query],
        pending: PendingQueries,
        in_flight: int,
        open_stream: Callable[[], Call],
    ) -> None:
        self._queries = queries
        self._pending = pending
        self._slots = asyncio.Semaphore(in_flight)
        self._open_stream = open_stream
        self._exhausted = False
        self._failure: Exception | None = None  # raised by the iterator of queries
        self._inbox: asyncio.Queue[_Event] = asyncio.Queue()

    async def answers(self) -> AsyncGenerator[Images | ElsError, None]:
        """Yield the result or the error of each query; broken streams are reopened."""
        attempts = RetryState(None)
        reading = asyncio.create_task(self._read_queries())
        self._connect()
        try:
            while not self._exhausted or len(self._pending) or self._failure:
                event = await self._inbox.get()
                if isinstance(event, UnavailableError):
                    await asyncio.sleep(attempts.pause_if_away_s(event))
                    await self._disconnect()
                    self._connect()
                elif isinstance(event, ElsError):
                    raise event
                elif event is not None:
                    attempts.progressed()
                    self._slots.release()
                    yield self._pending.answer(event)
                if self._failure:
                    raise self._failure
                while error := self._pending.pop_invalid():
                    self._slots.release()
                    yield error
            self._outbox.put_nowait(None)
            await self._receiving
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            await self._disconnect()

    def _connect(self) -> None:
        self._outbox: asyncio.Queue[pb.DenoiseRequest | None] = asyncio.Queue()
        for request in self._pending.requests():
            self._outbox.put_nowait(request)
        self._call = self._open_stream()
        self._sending = asyncio.create_task(self._send(self._call, self._outbox))
        self._receiving = asyncio.create_task(self._receive(self._call))

    async def _disconnect(self) -> None:
        self._call.cancel()
        self._sending.cancel()
        await asyncio.gather(self._sending, self._receiving, return_exceptions=True)

    async def _read_queries(self) -> None:
        try:
            async for query in _each(self._queries):
                await self._slots.acquire()
                if request := self._pending.add(query):
                    self._outbox.put_nowait(request)
                else:
                    self._inbox.put_nowait(None)
        except Exception as error:
            self._failure = error
        self._exhausted = True
        self._inbox.put_nowait(None)

    async def _send(self, call: Call, outbox: asyncio.Queue[pb.DenoiseRequest | None]) -> None:
        # The receiving task reports the end of the stream.
        with suppress(grpc.RpcError, asyncio.InvalidStateError):
            while request := await outbox.get():
                await call.write(request)
            await call.done_writing()

    async def _receive(self, call: Call) -> None:
        try:
            with own_errors(self._pending.route):
                async for message in call:
                    self._inbox.put_nowait(message)
            self._inbox.put_nowait(ended_early())
        except ElsError as error:
            self._inbox.put_nowait(error)


async def _each(queries: Iterable[Query] | AsyncIterable[Query]) -> AsyncIterator[Query]:
    if isinstance(queries, AsyncIterable):
        async for query in queries:
            yield query
    else:
        for query in queries:
            yield query
