"""Transports of a load: unary calls, or a stream; each call is counted when it ends."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc

from els_client._channel import Metadata, bearer, error_of_status, own_errors
from els_client.bench._requests import Requests
from els_client.bench.plan import Kind, Plan
from els_client.bench.tally import Tally
from els_client.errors import ElsError
from els_proto.denoise.v1 import denoise_pb2 as pb

_SERVICE = "/denoise.v1.DenoiserService/"
_REOPEN_AFTER_S = 0.1
# Timeout of a call without a deadline.
_PATIENCE_S = 600.0

# Called once at the end of a call, successful or not.
Done: TypeAlias = Callable[[], None]


@dataclass(frozen=True)
class Load:
    """State shared by all calls of a process."""

    plan: Plan
    requests: Requests
    tally: Tally
    image_bytes: int

    @property
    def metadata(self) -> Metadata:
        """Metadata that authorises each call."""
        return bearer(self.plan.token)

    def remaining_s(self, intended: float) -> float | None:
        """Return the remaining deadline of a call scheduled at ``intended``."""
        if self.plan.deadline_s is None:
            return None
        return max(intended + self.plan.deadline_s - time.monotonic(), 1e-3)

    def is_whole(self, tensor: pb.Tensor) -> bool:
        """Return whether a response has the size of its images."""
        return len(tensor.data) == self.plan.images * self.image_bytes


class UnaryCalls:
    """Unary calls, round robin over several connections."""

    def __init__(self, load: Load, channels: list[grpc.aio.Channel]) -> None:
        self._load = load
        self._metadata = load.metadata
        self._tasks: set[asyncio.Task[None]] = set()
        stubs = [_methods(channel) for channel in channels]
        self._stubs = itertools.cycle(stubs)

    def submit(self, kind: Kind, intended: float, done: Done) -> None:
        """Start a call now."""
        task = asyncio.get_running_loop().create_task(self._call(kind, intended))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: done())

    async def close(self) -> None:
        """Cancel calls in flight, which count as unfinished."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _call(self, kind: Kind, intended: float) -> None:
        load, sent = self._load, time.monotonic()
        left = load.remaining_s(intended)
        timeout = _PATIENCE_S if left is None else left
        if left is not None and kind != "sample":
            timeout += load.plan.grace_s
        body = load.requests.body(kind, left)
        first: float | None = None
        try:
            call = next(self._stubs)[kind](body, timeout=timeout, metadata=self._metadata)
            if kind == "sample":
                answer, first = await _last(call)
            else:
                answer = await call
            code = "OK" if answer and load.is_whole(_tensor(answer)) else "MALFORMED"
        except grpc.aio.AioRpcError as error:
            code = error.code().name
        except asyncio.CancelledError:
            load.tally.add_unanswered(kind, "UNFINISHED", intended)
            raise
        end = time.monotonic()
        load.tally.add(kind, intended=intended, sent=sent, end=end, code=code, first=first)


class StreamCalls:
    """Denoise calls over one ``DenoiseStream``, reopened when it ends."""

    def __init__(self, load: Load, channel: grpc.aio.Channel) -> None:
        self._load = load
        # The stubs do not support methods without a serialiser.
        self._method: Any = channel.stream_stream(
            f"{_SERVICE}DenoiseStream",
            response_deserializer=pb.DenoiseStreamResponse.FromString,
        )
        self._waiting: asyncio.Queue[tuple[float, Done]] = asyncio.Queue()
        self._pending: deque[tuple[float, float, Done]] = deque()
        self._task = asyncio.get_running_loop().create_task(self._run())

    def submit(self, kind: Kind, intended: float, done: Done) -> None:
        """Send a request as soon as the stream accepts it."""
        self._waiting.put_nowait((intended, done))

    async def close(self) -> None:
        """End the stream; calls without a response count as unfinished or unsent."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        for intended, *_ in self._pending:
            self._load.tally.add_unanswered("denoise", "UNFINISHED", intended)
        while not self._waiting.empty():
            self._load.tally.add_unanswered("denoise", "UNSENT", self._waiting.get_nowait()[0])

    async def _run(self) -> None:
        while True:
            call = self._method(metadata=self._load.metadata)
            writer = asyncio.get_running_loop().create_task(self._write(call))
            try:
                with own_errors():
                    async for answer in call:
                        self._end(self._code(answer))
                code = "UNAVAILABLE"  # The server ended the stream early.
            except ElsError as error:
                code = error.code
            finally:
                writer.cancel()
                call.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            while self._pending:
                self._end(code)
            await asyncio.sleep(_REOPEN_AFTER_S)

    async def _write(self, call: Any) -> None:
        while True:
            intended, done = await self._waiting.get()
            self._pending.append((intended, time.monotonic(), done))
            await call.write(self._load.requests.body("denoise", self._load.remaining_s(intended)))

    def _code(self, answer: pb.DenoiseStreamResponse) -> str:
        if answer.HasField("error"):
            return error_of_status(answer.error).code
        return "OK" if self._load.is_whole(answer.response.denoised) else "MALFORMED"

    def _end(self, code: str) -> None:
        intended, sent, done = self._pending.popleft()
        end = time.monotonic()
        self._load.tally.add("denoise", intended=intended, sent=sent, end=end, code=code)
        done()


def _methods(channel: grpc.aio.Channel) -> dict[Kind, Any]:
    """Return the method of each kind; requests are serialised in advance."""
    return {
        "denoise": channel.unary_unary(
            f"{_SERVICE}Denoise", response_deserializer=pb.DenoiseResponse.FromString
        ),
        "score": channel.unary_unary(
            f"{_SERVICE}Score", response_deserializer=pb.ScoreResponse.FromString
        ),
        "sample": channel.unary_stream(
            f"{_SERVICE}Sample", response_deserializer=pb.SampleResponse.FromString
        ),
    }


async def _last(call: Any) -> tuple[pb.SampleResponse | None, float | None]:
    """Return the last message of a sample, and the time of its first one.

    None in place of the message if it is not that of the last step.
    """
    last, first = None, None
    async for message in call:
        last, first = message, first or time.monotonic()
    return (last if last is not None and 0 < last.index == last.total else None), first


def _tensor(answer: pb.DenoiseResponse | pb.ScoreResponse | pb.SampleResponse) -> pb.Tensor:
    if isinstance(answer, pb.DenoiseResponse):
        return answer.denoised
    return answer.score if isinstance(answer, pb.ScoreResponse) else answer.x
