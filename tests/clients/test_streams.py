"""Many questions on one stream: order, window, errors, and servers that end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator

import numpy as np
import pytest
from tests.support.fake_server import FakeDenoiser
from tests.support.twin import Twin

from els_client import AsyncClient, Client, ElsError, InvalidArgumentError, Query, UnavailableError
from els_proto.denoise.v1 import denoise_pb2 as pb

X = np.zeros((1, 1, 4, 6), np.float32)


def query(value: float, model: str = "fashion-els") -> Query:
    return Query(X + np.float32(value), model=model, sigma=0.5)


def firsts(answers: list[object]) -> list[object]:
    """Return each answer's first pixel, or its error's code."""
    return [
        answer.code if isinstance(answer, ElsError) else float(np.asarray(answer).flat[0])
        for answer in answers
    ]


async def test_answers_come_in_the_order_of_their_questions(twin: Twin) -> None:
    answers = await twin.many((query(i) for i in range(50)), in_flight=7)
    assert firsts(answers) == [2.0 * i for i in range(50)]


async def test_no_question_is_no_answer(twin: Twin) -> None:
    assert await twin.many([]) == []


async def test_questions_of_a_stream_carry_their_own_deadline(
    twin: Twin, fake: FakeDenoiser
) -> None:
    asked = [query(0), Query(X, model="fashion-els", time=1.0, timeout_s=0.5, priority=3)]
    await twin.many(asked)
    first, second = fake.requests
    assert isinstance(first, pb.DenoiseRequest)
    assert isinstance(second, pb.DenoiseRequest)
    assert (first.timeout_s, first.priority) == (60.0, 0)
    assert (second.timeout_s, second.priority) == (0.5, 3)


async def test_a_failed_question_raises_its_error(twin: Twin) -> None:
    with pytest.raises(UnavailableError, match="draining"):
        await twin.many([query(1), query(2, "away"), query(3)])


async def test_a_failed_question_yields_its_error_in_its_place_on_request(twin: Twin) -> None:
    asked = [query(1), query(2, "away"), query(3), query(4, "missing")]
    answers = await twin.many(asked, return_exceptions=True)
    assert firsts(answers) == [2.0, "UNAVAILABLE", 6.0, "NOT_FOUND"]


async def test_a_question_that_cannot_be_sent_takes_its_place_among_the_answers(
    twin: Twin, fake: FakeDenoiser
) -> None:
    unsound = Query(X[0], model="fashion-els", sigma=0.5)
    asked = [unsound, query(1), unsound, unsound, unsound, query(2), unsound]
    answers = await twin.many(asked, in_flight=2, return_exceptions=True)
    no = InvalidArgumentError.code
    assert firsts(answers) == [no, 2.0, no, no, no, 4.0, no]
    assert len(fake.requests) == 2


async def test_what_a_server_that_ends_has_not_answered_is_asked_of_the_next(
    twin: Twin, fake: FakeDenoiser
) -> None:
    answers = await twin.many((query(i, "drains") for i in range(20)), in_flight=4)
    assert firsts(answers) == [2.0 * i for i in range(20)]
    assert fake.calls["stream"] == 3


async def test_an_error_while_questions_are_drawn_reaches_the_caller(twin: Twin) -> None:
    def unsound() -> Iterator[Query]:
        yield query(1)
        raise UnavailableError("the disk is gone")

    with pytest.raises(UnavailableError, match="the disk is gone"):
        await twin.many(unsound())


def test_no_more_than_the_window_is_drawn_ahead(target: str) -> None:
    drawn = 0

    def counted() -> Iterator[Query]:
        nonlocal drawn
        while True:
            drawn += 1
            yield query(drawn)

    with Client(target) as client:
        answers = client.denoise_many(counted(), in_flight=3)
        for answered in range(1, 20):
            next(answers)
            assert drawn == answered + 2
        answers.close()


async def test_no_more_than_the_window_is_drawn_ahead_of_a_slow_reader(target: str) -> None:
    drawn = 0

    async def counted() -> AsyncIterator[Query]:
        nonlocal drawn
        while True:
            drawn += 1
            yield query(drawn)

    async with AsyncClient(target) as client:
        answers = client.denoise_many(counted(), in_flight=3)
        for answered in range(1, 20):
            await anext(answers)
            assert drawn <= answered + 4  # One is drawn, and waits for its turn.
        await answers.aclose()


async def test_an_answer_does_not_wait_for_the_next_question(target: str) -> None:
    answered = asyncio.Event()

    async def patient() -> AsyncIterator[Query]:
        yield query(1)
        await answered.wait()
        yield query(2)

    async with AsyncClient(target) as client:
        answers = client.denoise_many(patient())
        assert firsts([await anext(answers)]) == [2.0]
        answered.set()
        assert firsts([await anext(answers)]) == [4.0]
        with pytest.raises(StopAsyncIteration):
            await anext(answers)


def test_leaving_the_loop_early_leaves_no_thread_behind(target: str) -> None:
    with Client(target) as client:
        for _ in client.denoise_many(query(i) for i in range(100)):
            break
    senders = [one for one in threading.enumerate() if "consume" in one.name]
    for sender in senders:
        sender.join(10)
        assert not sender.is_alive()
