"""The engine loads what can be loaded, says why the rest cannot, and drives trajectories."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.e2e.models_folder import DOCUMENTS, SHAPE, write_models
from tests.engine.conftest import Recorder, query, turns

from els_service.denoisers.noise import seeded_noise
from els_service.denoisers.samplers import SAMPLERS, Options, sample
from els_service.engine.engine import Engine
from els_service.engine.repository import ModelRepository
from els_service.errors import NotFoundError, UnavailableError


async def test_good_models_are_served_and_bad_ones_are_explained(
    engine: Engine, tmp_path: Path
) -> None:
    root = write_models(tmp_path / "models", {**DOCUMENTS, "bad": "kind: magic\n", "worse": "["})
    await engine.load(ModelRepository(root))
    assert list(engine.models) == sorted(DOCUMENTS)
    assert {name: error.path for name, error in engine.faults.items()} == {
        name: str(root / name / "model.yaml") for name in ("bad", "worse")
    }
    assert "zeros" in engine
    assert "bad" not in engine


async def test_a_model_that_fails_at_its_first_question_does_not_take_the_others_along(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_models(tmp_path / "models", {name: DOCUMENTS[name] for name in ("ideal", "zeros")})
    repository = ModelRepository(root)
    broken = Recorder(1e-6)
    broken.fails_on = {0.0}
    load = repository.load
    monkeypatch.setattr(repository, "load", lambda name: broken if name == "ideal" else load(name))
    await engine.load(repository)
    assert list(engine.models) == ["zeros"]
    assert "failed at its first question" in str(engine.faults["ideal"])


async def test_a_model_asked_for_while_others_are_loaded_is_unavailable_then_not_found(
    engine: Engine,
) -> None:
    with pytest.raises(UnavailableError, match="still being loaded"):
        engine.denoiser("zeros")
    engine.loading = False
    with pytest.raises(NotFoundError, match="expected one of none, got 'zeros'"):
        engine.denoiser("zeros")


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
async def test_trajectories_that_share_batches_keep_the_bits_that_they_have_alone(
    engine: Engine, tmp_path: Path, sampler: str
) -> None:
    root = write_models(tmp_path / "models", {"zeros": DOCUMENTS["zeros"]})
    await engine.load(ModelRepository(root))
    options = Options(steps=3, churn=0.5)

    async def drawn(seed: int, count: int) -> torch.Tensor:
        labels = np.arange(count) % 4 - 1
        trajectory = SAMPLERS[sampler](seeded_noise(seed, count, SHAPE), options)
        windows = np.zeros(count, np.int64)
        steps = [step async for step in engine.sample("zeros", trajectory, labels, windows)]
        return steps[-1].x

    together = await asyncio.gather(*(drawn(seed, 1 + seed % 5) for seed in range(12)))
    for seed, got in enumerate(together):
        count = 1 + seed % 5
        labels = [i % 4 - 1 for i in range(count)]
        *_, last = sample(
            engine.denoiser("zeros"),
            count=count,
            seed=seed,
            sampler=sampler,
            options=options,
            labels=labels,
        )
        assert torch.equal(got, last.x)


async def test_a_trajectory_that_is_left_leaves_no_question_behind(engine: Engine) -> None:
    recorder = Recorder()
    engine.add("model", recorder)
    noise = seeded_noise(0, 1, recorder.info.shape)
    trajectory = SAMPLERS["ddim"](noise, Options(steps=5))
    zero = np.zeros(1, np.int64)
    steps = engine.sample("model", trajectory, zero - 1, zero)
    await anext(steps)
    recorder.go.clear()
    waiting = asyncio.ensure_future(anext(steps))
    await recorder.until_entered()
    await recorder.until_entered()
    waiting.cancel()
    await turns()
    recorder.go.set()
    await engine.denoise("model", query(7))
    assert len(recorder.batches) == 3
    assert recorder.batches[-1] == [7]
