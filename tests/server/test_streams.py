"""Streams with ordered responses: each request that was read gets one, however the stream ends."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator

import pytest
from google.rpc import code_pb2

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.engine.budget import Budget
from els_service.errors import UnavailableError
from els_service.server.services.streams import WINDOW, Request, Window, in_order


def roomy() -> Window:
    return Window(Budget(1 << 40), "someone")


class Caller:
    """Sends requests for ever, or a few; counts those that were read and begun."""

    def __init__(self, count: int = 1 << 30, shape: tuple[int, ...] = ()) -> None:
        self._count = count
        self._x = pb.Tensor(shape=shape, data=bytes(math.prod(shape)))
        self.read = self.begun = 0
        self.go = asyncio.Event()
        self.futures: list[asyncio.Future[pb.DenoiseStreamResponse]] = []

    async def requests(self) -> AsyncIterator[pb.DenoiseRequest]:
        while self.read < self._count:
            await asyncio.sleep(0)
            self.read += 1
            yield pb.DenoiseRequest(model=str(self.read), x=self._x)

    def begin(self, request: Request) -> asyncio.Future[pb.DenoiseStreamResponse]:
        self.begun += 1
        future = asyncio.ensure_future(self._answer(request))
        self.futures.append(future)
        return future

    async def _answer(self, request: Request) -> pb.DenoiseStreamResponse:
        await self.go.wait()
        answer = pb.DenoiseStreamResponse()
        answer.error.message = request.model
        return answer

    async def turns(self) -> None:
        for _ in range(5 * WINDOW):
            await asyncio.sleep(0)


async def test_no_more_than_the_window_is_read_until_an_answer_is_taken() -> None:
    caller = Caller()
    stream = aiter(in_order(caller.requests(), caller.begin, asyncio.Event(), roomy()))
    first = asyncio.ensure_future(anext(stream))
    await caller.turns()
    assert caller.read == caller.begun == WINDOW
    caller.go.set()
    assert (await first).error.message == "1"
    assert (await anext(stream)).error.message == "2"
    await caller.turns()
    assert caller.read == caller.begun == WINDOW + 1


async def test_requests_with_large_responses_take_several_places_of_the_window() -> None:
    caller = Caller(shape=(16, 3, 32, 32))  # u8: 48 KiB asked, 192 KiB answered
    stream = aiter(in_order(caller.requests(), caller.begin, asyncio.Event(), roomy()))
    first = asyncio.ensure_future(anext(stream))
    await caller.turns()
    assert caller.read == WINDOW
    caller = Caller(shape=(256, 3, 32, 32))  # 16 times as large: 7 MiB while it is computed
    stream = aiter(in_order(caller.requests(), caller.begin, asyncio.Event(), roomy()))
    second = asyncio.ensure_future(anext(stream))
    await caller.turns()
    assert caller.read == -(-WINDOW // 7)
    for waiting in (first, second):
        waiting.cancel()


async def test_a_drain_ends_a_stream_after_all_that_was_read_is_answered() -> None:
    caller, draining = Caller(), asyncio.Event()
    stream = aiter(in_order(caller.requests(), caller.begin, draining, roomy()))
    first = asyncio.ensure_future(anext(stream))
    await caller.turns()
    draining.set()
    caller.go.set()
    assert (await first).error.message == "1"
    for i in range(1, caller.read):
        assert (await anext(stream)).error.message == str(i + 1)
    with pytest.raises(UnavailableError):
        await anext(stream)


async def test_a_stream_that_its_caller_had_ended_ends_well_in_a_drain() -> None:
    caller, draining = Caller(count=3), asyncio.Event()
    stream = aiter(in_order(caller.requests(), caller.begin, draining, roomy()))
    first = asyncio.ensure_future(anext(stream))
    await caller.turns()
    draining.set()
    caller.go.set()
    assert (await first).error.message == "1"
    assert [answer.error.message async for answer in stream] == ["2", "3"]


async def test_a_cancelled_stream_cancels_its_requests() -> None:
    caller = Caller()
    stream = aiter(in_order(caller.requests(), caller.begin, asyncio.Event(), roomy()))
    first = asyncio.ensure_future(anext(stream))
    await caller.turns()
    first.cancel()
    await asyncio.wait([first, *caller.futures], timeout=10)
    assert all(future.cancelled() for future in [first, *caller.futures])
    read = caller.read
    await caller.turns()
    assert caller.read == read


async def test_answers_that_are_not_taken_count_in_the_budget_and_the_rest_is_rejected() -> None:
    caller, budget = Caller(count=4, shape=(256, 3, 32, 32)), Budget(16 << 20)
    budget.reserve("other", 1)
    window = Window(budget, "someone")
    stream = aiter(in_order(caller.requests(), caller.begin, asyncio.Event(), window))
    first = asyncio.ensure_future(anext(stream))
    await caller.turns()
    assert budget.held_by("someone") == pytest.approx(2 * 9 * 256 * 3 * 32 * 32, rel=0.1)
    caller.go.set()
    statuses = [(await first).error, *[each.error async for each in stream]]
    codes = [code_pb2.Code.Name(each.code) for each in statuses]
    assert codes == ["OK", "OK", "RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED"]
    assert budget.used == 1
