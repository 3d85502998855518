"""Samples that outlive their server, and calls that wait for a full one."""

from __future__ import annotations

import time

import grpc
import numpy as np
import pytest
from tests.support.fake_server import FakeDenoiser
from tests.support.twin import Twin

from els_client import AsyncClient, Client, ElsError, ResourceExhaustedError, UnavailableError
from els_client._channel import own_errors
from els_client._retries import RetryState, Trajectory
from els_proto.denoise.v1 import denoise_pb2 as pb

X = np.zeros((1, 1, 4, 6), np.float32)


async def test_a_sample_goes_on_where_a_draining_server_stopped(
    twin: Twin, fake: FakeDenoiser
) -> None:
    steps = await twin.steps(model="drains", steps=5, want=("x", "noise"))
    assert [step.index for step in steps] == [1, 2, 3, 4, 5]
    assert (steps[0].noise == 1).all()
    tokens = [request.resume_token for request in samples(fake)]
    assert tokens == [b"", b"2", b"4"]


async def test_a_sample_that_gave_way_to_other_callers_is_resumed_no_sooner_than_told(
    twin: Twin, fake: FakeDenoiser
) -> None:
    began = time.monotonic()
    steps = await twin.steps(model="gives_way", steps=5)
    assert [step.index for step in steps] == [1, 2, 3, 4, 5]
    assert [request.resume_token for request in samples(fake)] == [b"", b"2", b"4"]
    assert time.monotonic() - began >= 0.3


async def test_a_sample_outlives_a_broken_connection_if_it_asked_for_tokens(
    twin: Twin, fake: FakeDenoiser
) -> None:
    steps = await twin.steps(model="breaks", steps=5, survive_breaks=True)
    assert [step.index for step in steps] == [1, 2, 3, 4, 5]
    assert all(request.return_resume_token for request in samples(fake))


async def test_a_sample_without_a_token_ends_with_its_connection(twin: Twin) -> None:
    with pytest.raises(UnavailableError):
        await twin.steps(model="breaks", steps=5)


@pytest.mark.parametrize(
    ("code", "text", "expected"),
    [
        ("INTERNAL", "Stream removed (Received RST_STREAM with error code 2)", UnavailableError),
        ("INTERNAL", "the model failed", ElsError),
        ("CANCELLED", "Received RST_STREAM with error code 8", ElsError),
    ],
)
def test_a_stream_that_a_proxy_resets_is_a_broken_connection(
    code: str, text: str, expected: type[ElsError]
) -> None:
    none = grpc.aio.Metadata()
    with pytest.raises(ElsError) as caught, own_errors():
        raise grpc.aio.AioRpcError(grpc.StatusCode[code], none, none, details=text)
    assert type(caught.value) is expected


async def test_a_question_whose_answer_broke_off_is_asked_once_more(
    twin: Twin, fake: FakeDenoiser
) -> None:
    assert (await twin.call("denoise", X, model="torn", sigma=1.0) == 0).all()
    assert fake.calls["torn"] == 2


def test_a_question_is_not_asked_a_third_time_nor_beyond_its_deadline() -> None:
    torn = UnavailableError("torn")
    attempts = RetryState(60.0)
    assert 0.1 <= attempts.pause_s(torn) < 0.2
    with pytest.raises(UnavailableError):
        attempts.pause_s(torn)
    with pytest.raises(UnavailableError):
        RetryState(0.05).pause_s(torn)


def test_a_sample_is_given_up_after_attempts_that_brought_no_step() -> None:
    trajectory = Trajectory(pb.SampleRequest(), RetryState(600.0))
    trajectory.accept(pb.SampleResponse(resume_token=b"0"))
    away = UnavailableError("away")
    pauses = [trajectory.pause_s(away) for _ in range(5)]
    assert 0.1 <= pauses[0] < 0.2 < pauses[-1] < 2.5
    with pytest.raises(UnavailableError):
        trajectory.pause_s(away)


def test_steps_that_came_are_not_given_again_and_missing_ones_are_an_error() -> None:
    trajectory = Trajectory(pb.SampleRequest(), RetryState(600.0))
    indices = [
        step.index
        for index in (1, 2, 1, 2, 3)
        if (step := trajectory.accept(pb.SampleResponse(index=index, total=9)))
    ]
    assert indices == [1, 2, 3]
    with pytest.raises(ElsError, match="step 5 after step 3"):
        trajectory.accept(pb.SampleResponse(index=5, total=9))
    with pytest.raises(ElsError, match="after step 3 of 9"):
        trajectory.check_complete()


async def test_a_full_server_says_when_to_come_back(twin: Twin) -> None:
    with pytest.raises(ResourceExhaustedError, match="the queue is full") as caught:
        await twin.call("denoise", X, model="full", sigma=0.5)
    assert caught.value.retry_after_s == 0.15


@pytest.mark.parametrize("method", ["denoise", "sample"])
async def test_who_waits_for_a_full_server_comes_back_no_sooner_than_told(
    kind: type[Client] | type[AsyncClient], target: str, method: str, fake: FakeDenoiser
) -> None:
    twin = Twin(kind(target, wait_when_full=True))
    began = time.monotonic()
    if method == "sample":
        assert len(await twin.steps(model="full", steps=2)) == 2
    else:
        await twin.call("denoise", X, model="full", sigma=0.5)
    assert time.monotonic() - began >= 0.3
    assert fake.calls["full"] == 3
    await twin.close()


async def test_nobody_waits_beyond_the_deadline_nor_for_what_is_over_a_limit(
    kind: type[Client] | type[AsyncClient], target: str, fake: FakeDenoiser
) -> None:
    twin = Twin(kind(target, wait_when_full=True))
    for model, timeout_s in (("full", 0.1), ("busy", 60.0)):
        with pytest.raises(ResourceExhaustedError):
            await twin.call("denoise", X, model=model, sigma=0.5, timeout_s=timeout_s)
        assert fake.calls[model] == 1
    await twin.close()


def samples(fake: FakeDenoiser) -> list[pb.SampleRequest]:
    return [one for one in fake.requests if isinstance(one, pb.SampleRequest)]
