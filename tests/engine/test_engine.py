"""Trajectories through the engine: the bits that they have alone, whatever happens around them."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tests.engine.conftest import Observed, Recorder, ask, held, turns, values
from tests.support.models_folder import DOCUMENTS, SHAPE, write_models

from els_service.config import Scheduling
from els_service.denoisers.base import DenoiserInfo
from els_service.denoisers.noise import seeded_noise
from els_service.denoisers.samplers import (
    SAMPLERS,
    Options,
    Resume,
    Step,
    evaluations_of,
    sample,
    steps_of,
)
from els_service.engine.engine import Engine
from els_service.engine.request_context import RequestContext
from els_service.engine.sampling import SamplingRun
from els_service.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    QueueFullError,
    UnavailableError,
)
from els_service.repository import ModelRepository


def run_of(
    shape: tuple[int, int, int],
    *,
    sampler: str = "ddim",
    count: int = 1,
    seed: int = 0,
    options: Options | None = None,
    resume: Resume | None = None,
    labels: int = 0,
) -> SamplingRun:
    """Return a trajectory of ``count`` images whose labels go from -1 on, up to ``labels``."""
    options = options or Options(steps=5)
    return SamplingRun(
        SAMPLERS[sampler](seeded_noise(seed, count, shape), options, resume),
        np.arange(count) % (labels + 1) - 1,
        np.zeros(count, np.int64),
        evaluations_of(sampler, options, resume),
    )


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
async def test_trajectories_that_share_batches_keep_the_bits_that_they_have_alone(
    engine: Engine, tmp_path: Path, sampler: str
) -> None:
    root = write_models(tmp_path / "models", {"zeros": DOCUMENTS["zeros"]})
    await engine.models.load_all(ModelRepository(root))
    options = Options(steps=3, churn=0.5)

    async def drawn(seed: int, count: int) -> torch.Tensor:
        run = run_of(SHAPE, sampler=sampler, count=count, seed=seed, options=options, labels=3)
        return [step async for step in engine.sample("zeros", run)][-1].x

    together = await asyncio.gather(*(drawn(seed, 1 + seed % 5) for seed in range(12)))
    loaded = engine.models.find("zeros").loaded
    assert loaded is not None
    for seed, got in enumerate(together):
        count = 1 + seed % 5
        *_, last = sample(
            loaded.denoiser,
            count=count,
            seed=seed,
            sampler=sampler,
            options=options,
            labels=[i % 4 - 1 for i in range(count)],
        )
        assert torch.equal(got, last.x)


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
async def test_a_trajectory_goes_on_anywhere_with_the_bits_that_it_would_have_had(
    engine: Engine, sampler: str
) -> None:
    engine.models.add("model", Recorder(1e-6))
    options = Options(steps=4, churn=0.5)
    shape = Recorder().info.shape

    async def steps(resume: Resume | None) -> list[Step]:
        run = run_of(shape, sampler=sampler, count=3, options=options, resume=resume)
        return [step async for step in engine.sample("model", run)]

    whole = await steps(None)
    assert len(whole) == steps_of(sampler, options)
    for stop in whole[:-1]:
        rest = await steps(Resume(stop.index, stop.state))
        assert [step.index for step in rest] == [step.index for step in whole[stop.index :]]
        for got, expected in zip(rest, whole[stop.index :], strict=True):
            assert torch.equal(got.x, expected.x)
            assert torch.equal(got.denoised, expected.denoised)


async def test_a_trajectory_that_is_left_leaves_no_question_behind(engine: Engine) -> None:
    recorder = Recorder()
    engine.models.add("model", recorder)
    steps = engine.sample("model", run_of(recorder.info.shape))
    await anext(steps)
    recorder.go.clear()
    waiting = asyncio.ensure_future(anext(steps))
    await recorder.until_entered()
    await recorder.until_entered()
    waiting.cancel()
    await turns()
    recorder.go.set()
    await ask(engine, 7)
    assert len(recorder.batches) == 3
    assert recorder.batches[-1] == [7]


async def test_between_two_steps_a_trajectory_holds_nothing(engine: Engine) -> None:
    recorder = Recorder()
    engine.models.add("model", recorder)
    steps = engine.sample("model", run_of(recorder.info.shape))
    await anext(steps)
    gauges = {name: value for name, _, value in engine.gauges()}
    assert gauges["els_trajectories"] == 1
    assert gauges["els_queue_items"] == 0
    assert values(await ask(engine, 1)) == [2]
    await steps.aclose()
    assert {name: value for name, _, value in engine.gauges()}["els_trajectories"] == 0


async def test_readers_who_take_no_steps_hold_so_much_and_no_more(observed: Observed) -> None:
    engine, recorder = Engine(observed, Scheduling(in_flight_bytes=1000)), Recorder()
    engine.models.add("model", recorder)
    shape = recorder.info.shape
    try:
        # Six numbers an image, 24 bytes each.
        begun = [engine.sample("model", run_of(shape, count=count)) for count in (1, 5)]
        for steps in begun:
            await anext(steps)
        late = engine.sample("model", run_of(shape, count=1))
        with pytest.raises(
            QueueFullError, match="864 bytes are held, 864 bytes by this caller; 1000 bytes"
        ):
            await anext(late)
        assert observed.reasons == ["rejected_full"]
        for steps in begun:
            await steps.aclose()
        # Alone it may be as large as the limits of a call allow.
        alone = engine.sample("model", run_of(shape, count=20))
        assert (await anext(alone)).index == 1
        await alone.aclose()
    finally:
        engine.close()


async def test_a_trajectory_that_cannot_be_in_time_is_refused_before_its_first_step(
    engine: Engine,
) -> None:
    engine.models.add("model", Recorder(0.2))
    for _ in range(3):
        await ask(engine, 1)
    loaded = engine.models.find("model").loaded
    assert loaded is not None
    each = loaded.costs.seconds(0.2)
    run = run_of(Recorder().info.shape, options=Options(steps=1000))
    with pytest.raises(DeadlineExceededError, match="evaluates model 1000 times"):
        await anext(
            engine.sample("model", run, RequestContext(deadline=time.monotonic() + 500 * each))
        )


async def test_a_fresh_server_refuses_a_trajectory_that_cannot_be_in_time(engine: Engine) -> None:
    recorder = Recorder(1.0)
    engine.models.add("model", recorder)
    run = run_of(recorder.info.shape, options=Options(steps=20))
    expected = (
        r"model 20 times, 1 s each by prediction: 20 s; 4\.\d* s are left of .* raise .*deadline"
    )
    with pytest.raises(DeadlineExceededError, match=expected):
        await anext(engine.sample("model", run, RequestContext(deadline=time.monotonic() + 4.9)))
    assert recorder.batches == []


async def test_a_trajectory_with_a_wrong_label_is_refused(engine: Engine) -> None:
    engine.models.add("model", Recorder())
    run = run_of(Recorder().info.shape, count=2, labels=1)
    with pytest.raises(InvalidArgumentError, match="labels"):
        await anext(engine.sample("model", run))


async def test_a_trajectory_is_answered_by_the_version_that_it_began_with(engine: Engine) -> None:
    old, new = Recorder(), Recorder()
    engine.models.add("model", old)
    steps = engine.sample("model", run_of(old.info.shape))
    await anext(steps)
    engine.models.add("model", new)
    assert len([step async for step in steps]) == 4
    assert len(old.batches) == 5
    assert new.batches == []


async def test_an_interrupted_trajectory_ends_as_unavailable(engine: Engine) -> None:
    recorder = Recorder()
    engine.models.add("model", recorder)
    steps = engine.sample("model", run_of(recorder.info.shape))
    await anext(steps)
    engine.interrupt("it is late")
    with pytest.raises(UnavailableError, match="it is late"):
        await anext(steps)


async def test_gauges_tell_what_waits_and_how_long_the_device_worked(engine: Engine) -> None:
    recorder = Recorder()
    first = await held(engine, recorder)
    waiting = [ask(engine, i, i) for i in range(3)]
    await turns()
    gauges = {name: value for name, _, value in engine.gauges()}
    assert gauges["els_queue_items"] == 3
    assert gauges["els_queue_cost_seconds"] == pytest.approx(6e-3)
    assert gauges["els_queue_milliseconds"] == 6
    assert gauges["els_device_running_seconds"] > 0
    recorder.go.set()
    await asyncio.gather(first, *waiting)
    gauges = {name: value for name, _, value in engine.gauges()}
    assert gauges["els_queue_items"] == 0
    assert gauges["els_device_busy_seconds_total"] > 0
    assert gauges["els_device_running_seconds"] == 0


async def test_statistics_count_queries_batches_and_images(engine: Engine) -> None:
    recorder = Recorder()
    recorder.fails_on = {9.0}
    first = await held(engine, recorder)
    others = [ask(engine, i, i) for i in (1, 2)]
    await turns()
    recorder.go.set()
    await asyncio.gather(first, *others)
    with pytest.raises(ZeroDivisionError):
        await ask(engine, 9)
    loaded = engine.models.find("model").loaded
    assert loaded is not None
    statistics = loaded.statistics.settle()
    assert (statistics.succeeded.count, statistics.failed.count) == (3, 1)
    assert statistics.batches[4].count == 1
    assert statistics.queued.count == statistics.computed.count >= 3
    assert abs(statistics.last - time.time()) < 60


class Decoder(Recorder):
    """A recorder whose images decode to their numbers, and a one."""

    def __init__(self, seconds: float = 1e-3) -> None:
        super().__init__(seconds)
        self.decoded = 0

    @property
    def info(self) -> DenoiserInfo:
        return dataclasses.replace(super().info, decoded_shape=(1, 1, 7))

    def decode(self, latents: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the images of latents."""
        self.decoded += len(latents)
        flat = latents.reshape(len(latents), 1, 1, -1)
        return np.concatenate([flat, np.ones_like(flat[..., :1])], axis=-1)


def decoding_run(count: int) -> SamplingRun:
    """Return a trajectory of one step whose latents are to be decoded."""
    run = run_of(Decoder().info.shape, count=count, options=Options(steps=1))
    return dataclasses.replace(run, decode=True)


async def test_latents_are_decoded_for_those_who_want_it(
    engine: Engine, observed: Observed
) -> None:
    decoder = Decoder()
    engine.models.add("model", decoder)
    (step,) = [step async for step in engine.sample("model", decoding_run(3))]
    assert step.decoded is not None
    assert torch.equal(step.decoded[..., :6].reshape(step.x.shape), step.x.float())
    assert (step.decoded.shape, decoder.decoded) == ((3, 1, 1, 7), 3)
    assert sum(observed.images) == 6


async def test_decoding_waits_its_turn_and_is_dropped_when_it_is_late(observed: Observed) -> None:
    now = [0.0]
    engine, decoder, other = Engine(observed, clock=lambda: now[0]), Decoder(1e-6), Recorder()
    try:
        first = await held(engine, other)
        engine.models.add("decoder", decoder)
        steps = engine.sample("decoder", decoding_run(1), RequestContext(deadline=1.0))
        late = asyncio.ensure_future(anext(steps))
        await turns()
        assert sum(v for name, _, v in engine.gauges() if name == "els_queue_items") == 1
        now[0] = 2.0
        other.go.set()
        with pytest.raises(DeadlineExceededError, match="in the queue of decoder"):
            await late
        assert (decoder.decoded, observed.reasons) == (0, ["expired"])
        await first
    finally:
        engine.close()
