"""A batch that nobody waits for any more gives its device back."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest
import torch
from tests.engine.conftest import WAIT_S, Observed, Recorder, Steady, ask, turns, values

from els_kernels import ComputationStoppedError, PatchAttention, checkpoint
from els_service.denoisers.analytic import AnalyticDenoiser
from els_service.denoisers.banks import make_bank
from els_service.denoisers.base import Denoised, Query, make_query
from els_service.denoisers.levels import from_sigma
from els_service.engine.engine import Engine
from els_service.engine.loaded_model import answers
from els_service.engine.request_context import RequestContext
from els_service.errors import DeadlineExceededError

PROMPT_S = 2.0


class Tiled(Recorder):
    """Looks at its control at tiles that never end, until ``go``."""

    def denoise(self, query: Query) -> Denoised:
        self.batches.append(query.x[:, 0, 0, 0].tolist())
        self.entered.release()
        while not self.go.wait(0.001):
            checkpoint()
        return Denoised(2 * query.pixels, query.x.sum(1).numpy())


@pytest.fixture
def tiled(engine: Engine) -> Tiled:
    """A model whose batches are computed until ``go`` is set."""
    tiled = Tiled()
    engine.models.add("model", tiled)
    engine.models.add("other", Recorder())
    loaded = engine.models.find("model").loaded
    assert loaded is not None
    loaded.costs = Steady()
    return tiled


async def test_a_batch_whose_only_caller_left_is_stopped(
    engine: Engine, tiled: Tiled, observed: Observed
) -> None:
    tiled.go.clear()
    left = ask(engine, 1)
    await tiled.until_entered()
    left.cancel()
    assert values(await asyncio.wait_for(ask(engine, 2, model="other"), WAIT_S)) == [4]
    assert left.cancelled()
    assert observed.reasons == ["discarded"]
    assert tiled.batches == [[1]]


async def test_a_batch_whose_deadlines_have_passed_is_stopped(engine: Engine, tiled: Tiled) -> None:
    tiled.go.clear()
    late = ask(engine, 1, deadline=time.monotonic() + 0.1)
    await tiled.until_entered()
    assert values(await asyncio.wait_for(ask(engine, 2, model="other"), WAIT_S)) == [4]
    with pytest.raises(DeadlineExceededError):
        await late


async def test_a_batch_that_one_of_its_callers_still_wants_goes_on(
    engine: Engine, tiled: Tiled
) -> None:
    tiled.go.clear()
    first = ask(engine, 0)
    await tiled.until_entered()
    leaves, expires, stays = (
        ask(engine, 1),
        ask(engine, 2, deadline=time.monotonic() + 0.3),
        ask(engine, 3),
    )
    await turns()
    first.cancel()
    await tiled.until_entered()
    assert tiled.batches[-1] == [1, 2, 3]
    leaves.cancel()
    await asyncio.wait({expires}, timeout=0.4)
    tiled.go.set()
    assert values(await asyncio.wait_for(stays, WAIT_S)) == [6]
    assert len(tiled.batches) == 2


async def test_every_part_of_a_query_that_was_cut_is_stopped(engine: Engine, tiled: Tiled) -> None:
    tiled.seconds = 10.0
    tiled.go.clear()
    left = ask(engine, 1, 2, 3)
    await tiled.until_entered()
    left.cancel()
    assert values(await asyncio.wait_for(ask(engine, 2, model="other"), WAIT_S)) == [4]
    assert tiled.batches == [[1]]


async def test_the_time_of_a_stopped_batch_is_given_back(engine: Engine, tiled: Tiled) -> None:
    tiled.seconds = 100.0
    tiled.go.clear()
    left = ask(engine, 1)
    await tiled.until_entered()
    with pytest.raises(DeadlineExceededError):
        await ask(engine, 2, deadline=time.monotonic() + 5)
    left.cancel()
    tiled.seconds = 1.0
    await turns()
    tiled.go.set()
    assert values(await ask(engine, 3, deadline=time.monotonic() + 5)) == [6]


def test_a_batch_that_was_stopped_is_not_halved() -> None:
    class Stopped(Recorder):
        def denoise(self, query: Query) -> Denoised:
            self.batches.append(query.x[:, 0, 0, 0].tolist())
            raise ComputationStoppedError("as told")

    stopped = Stopped()
    with pytest.raises(ComputationStoppedError):
        answers(stopped, [_image(1.0), _image(2.0)])
    assert stopped.batches == [[1.0, 2.0]]


def _image(value: float) -> Query:
    return make_query(torch.full((1, 1, 2, 3), value), from_sigma(np.ones(1)))


@pytest.fixture(scope="module")
def machine() -> AnalyticDenoiser:
    """A real machine whose answer to one image takes several seconds."""
    pixels = np.random.default_rng(0).integers(0, 256, (8_000, 3, 32, 32), np.uint8)
    bank = make_bank(pixels)
    return AnalyticDenoiser(PatchAttention(bank.pixels()), bank, machine="els")


@pytest.mark.parametrize("leaves", ["cancelled", "expired"])
@pytest.mark.slow
async def test_a_slow_answer_of_a_real_machine_is_stopped_and_the_device_free(
    engine: Engine, machine: AnalyticDenoiser, leaves: str
) -> None:
    engine.models.add("slow", machine)
    engine.models.add("quick", Recorder())
    asked = make_query(torch.zeros(1, 3, 32, 32), from_sigma(np.ones(1)), windows=7)
    estimate = machine.predict_seconds(asked)
    assert estimate > PROMPT_S / 2
    # Nothing has been measured: this is not yet late enough to be refused at once.
    allowed = estimate / 2.2 if leaves == "expired" else WAIT_S
    context = RequestContext(deadline=time.monotonic() + allowed)
    slow = engine.denoise(engine.models.find("slow"), asked, context)
    assert not isinstance(slow, Denoised)
    running = asyncio.ensure_future(slow)
    quick = ask(engine, 1, model="quick")
    if leaves == "cancelled":
        async with asyncio.timeout(WAIT_S):
            while _running_s(engine) < 0.1:
                await asyncio.sleep(0.001)
        running.cancel()
        allowed = 0.0
    began = time.monotonic()
    assert values(await asyncio.wait_for(quick, WAIT_S)) == [2]
    assert time.monotonic() - began < allowed + PROMPT_S
    with pytest.raises((DeadlineExceededError, asyncio.CancelledError)):
        await running


def _running_s(engine: Engine) -> float:
    return {name: value for name, _, value in engine.gauges()}["els_device_running_seconds"]
