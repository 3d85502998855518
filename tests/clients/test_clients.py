"""What both clients promise, asked of a real gRPC server with arithmetic behind it."""

from __future__ import annotations

import asyncio
import inspect
import math
from contextlib import aclosing
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from tests.support.fake_server import FakeDenoiser
from tests.support.twin import Twin

from els_client import (
    AsyncClient,
    AsyncRepository,
    Client,
    DeadlineExceededError,
    ElsError,
    InvalidArgumentError,
    NotFoundError,
    Query,
    Repository,
    ResourceExhaustedError,
    UnavailableError,
)
from els_proto.denoise.v1 import denoise_pb2 as pb

X = np.linspace(-1, 1, 48, dtype=np.float32).reshape(2, 1, 4, 6)
ELS: dict[str, Any] = {"model": "fashion-els", "sigma": 0.5}


async def test_denoise_and_score_return_writable_float32_of_the_shape_of_x(twin: Twin) -> None:
    for method, expected in (("denoise", 2 * X), ("score", -X)):
        answer = await twin.call(method, X, **ELS)
        assert answer.dtype == np.float32
        assert answer.flags.writeable
        np.testing.assert_array_equal(answer, expected)


async def test_levels_labels_and_windows_reach_the_server_as_they_were_given(
    twin: Twin, fake: FakeDenoiser
) -> None:
    await twin.call(
        "denoise", X, model="fashion-els", time=np.array([0.25, 1.0]), label=[1, -1], window=3
    )
    (request,) = fake.requests
    assert isinstance(request, pb.DenoiseRequest)
    assert request.level == pb.NoiseLevel(time=[0.25, 1.0])
    assert list(request.labels) == [1, -1]
    assert list(request.windows) == [3]
    assert not request.return_log_evidence


async def test_priority_version_and_deadline_reach_the_server(
    twin: Twin, fake: FakeDenoiser
) -> None:
    for method in ("denoise", "score"):
        await twin.call(method, X, **ELS, priority=1, version="3", timeout_s=5.0)
    await twin.steps(model="fashion-els", priority=1, version="3", timeout_s=5.0)
    for request, remaining_s in zip(fake.requests, fake.remaining_s, strict=True):
        assert isinstance(request, pb.DenoiseRequest | pb.ScoreRequest | pb.SampleRequest)
        assert (request.priority, request.version) == (1, "3")
        assert remaining_s is not None
        assert 3 < remaining_s < 6
    await twin.call("model", "fashion-els", version="2")
    assert fake.requests[-1] == pb.GetModelRequest(name="fashion-els", version="2")


async def test_evidence_comes_with_the_denoised_images(twin: Twin) -> None:
    denoised, evidence = await twin.call("denoise_with_evidence", X, **ELS)
    np.testing.assert_array_equal(denoised, 2 * X)
    np.testing.assert_array_equal(evidence, X[:, 0])


async def test_models_are_described_in_full(twin: Twin) -> None:
    els, rgb = await twin.call("models")
    assert els == await twin.call("model", "fashion-els")
    assert els.shape == (1, 4, 6)
    assert els.window.k == (3, 5)
    assert els.label_names == ("Boot", "Bag")
    assert els.limits.max_images == 256
    assert (els.limits.max_pixels, els.limits.priority_levels) == (9, 4)
    assert (els.version, els.memory_bytes) == ("3", 1000)
    assert els.bank.images == 7
    assert (els.step_seconds, rgb.step_seconds) == (0.25, 0.0)
    assert rgb.window is None
    assert rgb.bank is None


async def test_steps_count_from_one_and_the_last_holds_the_result_twice(twin: Twin) -> None:
    steps = await twin.steps(model="fashion-els", count=2, steps=4)
    assert [(step.index, step.total) for step in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert steps[0].x.shape == (2, 1, 4, 6)
    np.testing.assert_array_equal(steps[-1].x, steps[-1].denoised)


async def test_the_first_step_carries_the_noise_if_it_is_wanted(twin: Twin) -> None:
    first, last = await twin.steps(model="fashion-els", steps=2, want=("noise",))
    assert (first.noise == 1).all()
    with pytest.raises(AttributeError, match="noise"):
        _ = last.noise


async def test_steps_carry_only_what_is_wanted_but_the_last_carries_both(twin: Twin) -> None:
    first, last = await twin.steps(model="fashion-els", steps=2, want=("denoised",))
    assert first.denoised.shape == last.x.shape == last.denoised.shape
    with pytest.raises(AttributeError, match="has no x"):
        _ = first.x


async def test_sample_asks_for_what_its_defaults_say(twin: Twin, fake: FakeDenoiser) -> None:
    await twin.steps(model="fashion-els")
    expected = pb.SampleRequest(
        model="fashion-els",
        count=1,
        steps=20,
        sampler=pb.SAMPLER_DDIM,
        return_x=True,
        return_denoised=True,
    )
    assert fake.requests == [expected]


@pytest.mark.parametrize(
    ("model", "error", "code"),
    [
        ("missing", NotFoundError, "NOT_FOUND"),
        ("busy", ResourceExhaustedError, "RESOURCE_EXHAUSTED"),
        ("away", UnavailableError, "UNAVAILABLE"),
        ("picky", InvalidArgumentError, "INVALID_ARGUMENT"),
        ("broken", ElsError, "INTERNAL"),
    ],
)
async def test_each_status_becomes_its_error(
    twin: Twin, model: str, error: type[ElsError], code: str
) -> None:
    with pytest.raises(error) as unary:
        await twin.call("denoise", X, model=model, sigma=0.5)
    with pytest.raises(error) as stream:
        await twin.steps(model=model)
    assert type(unary.value) is type(stream.value) is error
    assert unary.value.code == stream.value.code == code


async def test_violations_are_read_from_the_details_of_the_status(twin: Twin) -> None:
    with pytest.raises(InvalidArgumentError, match="x: expected finite") as caught:
        await twin.call("score", X, model="picky", sigma=0.5)
    (violation,) = caught.value.violations
    assert (violation.field, violation.description) == ("x", "expected finite pixels, got NaN")


async def test_a_server_that_is_away_for_a_moment_is_asked_again(
    twin: Twin, fake: FakeDenoiser
) -> None:
    await twin.call("denoise", X, model="flaky", sigma=0.5)
    assert len(fake.requests) == 3


async def test_a_message_larger_than_the_default_retry_buffer_is_asked_again_too(
    twin: Twin, fake: FakeDenoiser
) -> None:
    large = np.zeros((4, 3, 256, 256), np.float32)
    answer = await twin.call("denoise", large, model="flaky", sigma=0.5)
    assert answer.shape == large.shape
    assert len(fake.requests) == 3


async def test_nothing_is_sent_before_the_arguments_are_sound(
    twin: Twin, fake: FakeDenoiser
) -> None:
    with pytest.raises(ValueError, match=r"x: expected shape \[B, C, H, W\], got shape \[4, 6\]"):
        await twin.call("denoise", X[0, 0], **ELS)
    with pytest.raises(ValueError, match="sampler: expected one of"):
        await twin.steps(model="fashion-els", sampler="lms")
    with pytest.raises(ValueError, match="priority: expected at least 1, got 0"):
        await twin.call("denoise", X, **ELS, priority=0)
    with pytest.raises(ValueError, match="in_flight: expected at least 1, got 0"):
        await twin.many([], in_flight=0)
    assert fake.requests == []


async def test_timeout_is_the_deadline_of_unary_calls_and_of_samples(
    kind: type[Client] | type[AsyncClient], target: str
) -> None:
    twin = Twin(kind(target, timeout_s=0.05))
    told = r"no answer within the 0\.05 s allowed: raise timeout_s \(--timeout\)"
    with pytest.raises(DeadlineExceededError, match=told):
        await twin.call("denoise", X, model="slow", sigma=0.5)
    with pytest.raises(TimeoutError, match=told):
        await twin.steps(model="slow")
    await twin.close()


@pytest.mark.slow
async def test_no_server_at_the_target_is_unavailable(
    kind: type[Client] | type[AsyncClient],
) -> None:
    twin = Twin(kind("127.0.0.1:1"))
    with pytest.raises(UnavailableError):
        await twin.call("models")
    await twin.close()


def test_breaking_out_of_the_loop_cancels_the_call(target: str, fake: FakeDenoiser) -> None:
    with Client(target) as client:
        for step in client.sample(model="endless"):
            assert step.index == 1
            break
        assert fake.cancelled.wait(10)


def test_closing_the_iterator_cancels_the_call(target: str, fake: FakeDenoiser) -> None:
    with Client(target) as client:
        steps = client.sample(model="endless")
        next(steps)
        steps.close()
        assert fake.cancelled.wait(10)


async def test_breaking_out_of_the_async_loop_cancels_the_call(
    target: str, fake: FakeDenoiser
) -> None:
    async with AsyncClient(target) as client:
        async for step in client.sample(model="endless"):
            assert step.index == 1
            break
        assert await asyncio.to_thread(fake.cancelled.wait, 10)


async def test_closing_the_async_iterator_cancels_the_call(target: str, fake: FakeDenoiser) -> None:
    async with AsyncClient(target) as client:
        async with aclosing(client.sample(model="endless")) as steps:
            await anext(steps)
        assert await asyncio.to_thread(fake.cancelled.wait, 10)


async def test_cancelling_a_task_cancels_its_call(target: str, fake: FakeDenoiser) -> None:
    async with AsyncClient(target) as client:
        endless = client.sample(model="endless")
        await anext(endless)
        task = asyncio.ensure_future(anext(endless))
        await asyncio.wait([task], timeout=0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(fake.cancelled.wait, 10)


def test_an_iterator_that_is_never_asked_starts_no_call(target: str, fake: FakeDenoiser) -> None:
    with Client(target) as client:
        client.sample(model="endless")
    assert fake.requests == []


def test_the_twins_have_the_same_methods_with_the_same_parameters() -> None:
    for one, other in ((Client, AsyncClient), (Repository, AsyncRepository)):
        for name, method in vars(one).items():
            if not name.startswith("_") and callable(method):
                assert parameters(getattr(other, name)) == parameters(method), name


def parameters(method: Any) -> list[tuple[str, object, object]]:
    """Return them without the types of questions, which may come asynchronously."""
    return [
        (name, one.kind, one.default) for name, one in inspect.signature(method).parameters.items()
    ]


BAD_TIMEOUTS = [
    math.nan,
    math.inf,
    -math.inf,
    0,
    -1.0,
    366 * 86_400.0,
    np.float32("nan"),
    True,
    "5",
]


@pytest.mark.parametrize("timeout_s", BAD_TIMEOUTS)
async def test_a_deadline_out_of_range_is_refused_before_anything_is_sent(
    twin: Twin, fake: FakeDenoiser, timeout_s: Any
) -> None:
    expected = r"^timeout_s: expected seconds, more than 0 and at most 31536000 \(a year\), got "
    for method in ("denoise", "denoise_with_evidence", "score"):
        with pytest.raises(InvalidArgumentError, match=expected) as caught:
            await twin.call(method, X, **ELS, timeout_s=timeout_s)
        assert caught.value.violations[0].field == "timeout_s"
    with pytest.raises(InvalidArgumentError, match=expected):
        # Where it is called, not where its first step is asked for.
        twin.client.sample(model="fashion-els", timeout_s=timeout_s)
    (answer,) = await twin.many([Query(X, **ELS, timeout_s=timeout_s)], return_exceptions=True)
    assert isinstance(answer, InvalidArgumentError)
    with pytest.raises(InvalidArgumentError, match=expected):
        type(twin.client)("127.0.0.1:1", timeout_s=timeout_s)
    assert fake.requests == []


async def test_a_deadline_may_be_any_kind_of_number_up_to_a_year(twin: Twin) -> None:
    for timeout_s in (30, np.float32(30.5), np.int64(30), Fraction(61, 2), 365 * 86_400.0):
        await twin.call("score", X, **ELS, timeout_s=timeout_s)
