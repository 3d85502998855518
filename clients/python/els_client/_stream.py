"""Stream of queries and their results in order: state of both clients, and the blocking one."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeAlias

from els_client import _codec as codec
from els_client._channel import error_of_status, own_errors, timeout_of
from els_client._retries import RetryState
from els_client._route import Route
from els_client._types import Images, Query
from els_client.errors import ElsError, InvalidArgumentError, UnavailableError, Violation, error_of
from els_proto.denoise.v1 import denoise_pb2 as pb

# Return type of the stub: a cancellable iterator of responses without a public type.
Call: TypeAlias = Any
OpenStream: TypeAlias = Callable[[Iterator[pb.DenoiseRequest]], Call]


def check_in_flight(in_flight: int) -> None:
    """Raise InvalidArgumentError unless ``in_flight`` is at least 1."""
    if in_flight < 1:
        text = f"expected at least 1, got {in_flight}"
        raise InvalidArgumentError(f"in_flight: {text}", [Violation("in_flight", text)])


class PendingQueries:
    """Pending queries of a stream in order; the result of an invalid one is its error.

    Args:
        timeout_s: Default deadline of a query.
        route: Route of the channel.
    """

    def __init__(self, timeout_s: float, route: Route) -> None:
        self._timeout_s = timeout_s
        self.route = route
        self._queries: deque[pb.DenoiseRequest | ElsError] = deque()

    def __len__(self) -> int:
        return len(self._queries)

    def add(self, query: Query) -> pb.DenoiseRequest | None:
        """Return the request of a query, or None if the query is invalid."""
        try:
            request = codec.encode_query(pb.DenoiseRequest, query)
            request.timeout_s = timeout_of(query.timeout_s, self._timeout_s)
        except ElsError as error:
            self._queries.append(error)
            return None
        self._queries.append(request)
        return request

    def requests(self) -> list[pb.DenoiseRequest]:
        """Return the requests to send again on a new stream."""
        return [one for one in self._queries if isinstance(one, pb.DenoiseRequest)]

    def pop_invalid(self) -> ElsError | None:
        """Return the error of the oldest query if it is invalid and was not sent."""
        oldest = self._queries[0] if self._queries else None
        if not isinstance(oldest, ElsError):
            return None
        self._queries.popleft()
        return oldest

    def answer(self, message: pb.DenoiseStreamResponse) -> Images | ElsError:
        """Return the result or error of the oldest query, which was sent."""
        if not self._queries:
            return error_of("INTERNAL", "the server sent more responses than there were requests")
        self._queries.popleft()
        if message.HasField("error"):
            return error_of_status(message.error)
        return codec.decode_tensor(message.response.denoised)


def answers_of(
    queries: Iterator[Query], pending: PendingQueries, in_flight: int, open_stream: OpenStream
) -> Generator[Images | ElsError, None, None]:
    """Yield the result or the error of each query; broken streams are reopened."""
    attempts, stream = RetryState(None), _Stream(open_stream, [], pending.route)
    try:
        while True:
            for query in itertools.islice(queries, in_flight - len(pending)):
                if request := pending.add(query):
                    stream.send(request)
            if not len(pending):
                return stream.finish()
            if error := pending.pop_invalid():
                yield error
                continue
            try:
                message = stream.receive()
            except UnavailableError as error:
                time.sleep(attempts.pause_if_away_s(error))
                stream.close()
                stream = _Stream(open_stream, pending.requests(), pending.route)
                continue
            attempts.progressed()
            yield pending.answer(message)
    finally:
        stream.close()


class _Stream:
    """One ``DenoiseStream``; a thread of gRPC sends the requests in its queue."""

    def __init__(
        self, open_stream: OpenStream, requests: list[pb.DenoiseRequest], route: Route
    ) -> None:
        self._route = route
        self._outbox: SimpleQueue[pb.DenoiseRequest | None] = SimpleQueue()
        for request in requests:
            self._outbox.put(request)
        self._call = open_stream(iter(self._outbox.get, None))

    def send(self, request: pb.DenoiseRequest) -> None:
        self._outbox.put(request)

    def receive(self) -> pb.DenoiseStreamResponse:
        with own_errors(self._route):
            for message in self._call:
                answer: pb.DenoiseStreamResponse = message
                return answer
        raise ended_early()

    def finish(self) -> None:
        """Half-close the stream; all queries have results, so its status is ignored."""
        self._outbox.put(None)
        with suppress(ElsError), own_errors():
            for _ in self._call:
                pass

    def close(self) -> None:
        self._outbox.put(None)
        self._call.cancel()


def ended_early() -> ElsError:
    """Return the error of a stream that the server ended early."""
    return error_of("UNAVAILABLE", "the server ended the stream")
