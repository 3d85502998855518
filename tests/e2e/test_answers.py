"""What both clients get from a real server process is, bit for bit, what the library computes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.models_folder import DOCUMENTS, LABELLED, LABELS, RGB, SHAPE, WITH_EVIDENCE
from tests.support.processes import ServerProcess
from tests.support.twin import Twin

from els_client import AsyncClient
from els_service.denoisers.answers import score
from els_service.denoisers.base import Denoiser, make_query
from els_service.denoisers.levels import from_alpha_bar, from_sigma, from_time
from els_service.denoisers.noise import seeded_noise
from els_service.denoisers.samplers import Options, sample
from els_service.repository import ModelRepository

LEVELS = {"sigma": from_sigma, "alpha_bar": from_alpha_bar, "time": from_time}
FEW = {"gaussian": RGB}


def images(model: str, count: int = 3, seed: int = 1) -> np.ndarray:
    """Return noisy images of the model's shape, float32."""
    shape = (count, *FEW.get(model, SHAPE))
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_same_bits(got: np.ndarray, expected: np.ndarray | torch.Tensor) -> None:
    expected = np.asarray(expected)
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    assert got.tobytes() == expected.tobytes()


@pytest.fixture(scope="module")
def library(models: Path) -> dict[str, Denoiser]:
    """The same models in this process."""
    repository = ModelRepository(models)
    return {name: repository.load(name) for name in repository.names()}


@pytest.mark.parametrize("model", sorted(DOCUMENTS))
@pytest.mark.parametrize("level", sorted(LEVELS))
async def test_denoise_and_score_are_the_library_s(
    twin: Twin, library: dict[str, Denoiser], model: str, level: str
) -> None:
    x, values = images(model), [0.2, 0.5, 0.9]
    query = make_query(torch.from_numpy(x), LEVELS[level](values))
    expected = library[model].denoise(query).mean
    options: dict[str, Any] = {"model": model, level: values}
    assert_same_bits(await twin.call("denoise", x, **options), expected)
    assert_same_bits(await twin.call("score", x, **options), score(query, expected))


@pytest.mark.parametrize("model", WITH_EVIDENCE)
async def test_evidence_is_the_library_s(
    twin: Twin, library: dict[str, Denoiser], model: str
) -> None:
    x = images(model)
    expected = library[model].denoise(make_query(torch.from_numpy(x), from_sigma([0.7])))
    denoised, evidence = await twin.call("denoise_with_evidence", x, model=model, sigma=0.7)
    assert expected.log_evidence is not None
    assert_same_bits(denoised, expected.mean)
    assert_same_bits(evidence, expected.log_evidence)


@pytest.mark.parametrize("model", LABELLED)
async def test_labels_restrict_each_image_by_itself(
    twin: Twin, library: dict[str, Denoiser], model: str
) -> None:
    x, labels = images(model, count=4), [2, -1, 0, 1]
    query = make_query(torch.from_numpy(x), from_sigma([0.7]), labels)
    got = await twin.call("denoise", x, model=model, sigma=0.7, label=labels)
    assert_same_bits(got, library[model].denoise(query).mean)
    unlabelled = await twin.call("denoise", x, model=model, sigma=0.7)
    differ = [not np.array_equal(a, b) for a, b in zip(got, unlabelled, strict=True)]
    assert differ == [True, False, True, True]


async def test_windows_are_one_for_all_or_one_each(
    twin: Twin, library: dict[str, Denoiser]
) -> None:
    x = images("zeros")
    for window in (3, [1, 5, 11]):
        query = make_query(torch.from_numpy(x), from_sigma([0.7]), windows=window)
        got = await twin.call("denoise", x, model="zeros", sigma=0.7, window=window)
        assert_same_bits(got, library["zeros"].denoise(query).mean)


@pytest.mark.parametrize("model", sorted(DOCUMENTS))
async def test_an_image_has_the_same_bits_alone_and_in_a_batch(twin: Twin, model: str) -> None:
    x, sigma = images(model, count=5), [0.05, 0.3, 1.0, 4.0, 40.0]
    label = None if model == "gaussian" else [0, -1, 2, 1, -1]
    for method in ("denoise", "score"):
        together = await twin.call(method, x, model=model, sigma=sigma, label=label)
        for i in range(5):
            one = label[i] if label else None
            alone = await twin.call(method, x[i : i + 1], model=model, sigma=sigma[i], label=one)
            assert_same_bits(alone, together[i : i + 1])


@pytest.mark.parametrize("model", sorted(DOCUMENTS))
async def test_calls_that_wait_together_get_the_bits_that_they_get_alone(
    server: ServerProcess, model: str
) -> None:
    x = images(model, count=16)
    async with AsyncClient(server.target) as client:
        calls = (client.denoise(x[i : i + 1], model=model, sigma=0.1 + i) for i in range(16))
        together = await asyncio.gather(*calls)
        for i, got in enumerate(together):
            assert_same_bits(await client.denoise(x[i : i + 1], model=model, sigma=0.1 + i), got)


SAMPLERS: list[tuple[str, dict[str, Any]]] = [
    ("ddim", {}),
    ("ddim_released", {}),
    ("ddpm", {"eta": 0.5}),
    ("heun", {"churn": 1.0}),
]


@pytest.mark.parametrize(("sampler", "noise"), SAMPLERS, ids=[name for name, _ in SAMPLERS])
@pytest.mark.parametrize("model", ["zeros", "gaussian"])
async def test_every_step_of_a_sample_is_the_library_s(
    twin: Twin,
    library: dict[str, Denoiser],
    sampler: str,
    noise: dict[str, Any],
    model: str,
) -> None:
    labels = [1, -1] if model == "zeros" else -1
    expected = list(
        sample(
            library[model],
            count=2,
            seed=7,
            sampler=sampler,
            options=Options(steps=4, **noise),
            labels=labels,
        )
    )
    steps = await twin.steps(
        model=model,
        count=2,
        seed=7,
        steps=4,
        sampler=sampler,
        label=labels,
        **{"eta": None, **noise},
    )
    assert [(step.index, step.total) for step in steps] == [
        (step.index, step.total) for step in expected
    ]
    for step, other in zip(steps, expected, strict=True):
        assert_same_bits(step.x, other.x.float())
        assert_same_bits(step.denoised, other.denoised.float())
        assert step.alpha_bar == other.alpha_bar
    assert_same_bits(steps[-1].x, steps[-1].denoised)


@pytest.mark.parametrize(("sampler", "noise"), SAMPLERS, ids=[name for name, _ in SAMPLERS])
async def test_the_first_image_of_a_sample_has_the_same_bits_alone_and_in_a_batch(
    twin: Twin, sampler: str, noise: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"model": "zeros", "seed": 3, "steps": 3, "sampler": sampler, **noise}
    *_, alone = await twin.steps(count=1, label=2, **options)
    *_, together = await twin.steps(count=3, label=[2, 0, -1], **options)
    assert_same_bits(alone.x, together.x[:1])


async def test_the_first_step_carries_the_noise_that_it_started_from(twin: Twin) -> None:
    steps = await twin.steps(model="zeros", count=2, seed=9, steps=2, want=("noise",))
    assert_same_bits(steps[0].noise, seeded_noise(9, 2, SHAPE)(0).float())


async def test_every_model_is_described(twin: Twin) -> None:
    described = {model.name: model for model in await twin.call("models")}
    assert sorted(described) == sorted(DOCUMENTS)
    zeros = described["zeros"]
    assert await twin.call("model", "zeros") == zeros
    assert (zeros.kind, zeros.machine, zeros.padding) == ("analytic", "els", "zeros")
    assert (zeros.shape, zeros.label_count) == (SHAPE, LABELS)
    assert zeros.label_names == ("dot", "dash", "gap")
    assert zeros.window is not None
    assert zeros.window.max_k == 11
    assert (zeros.limits.max_images, zeros.limits.max_steps) == (256, 1000)
    assert zeros.limits.max_message_bytes == 64 << 20
    assert zeros.bank is not None
    assert (zeros.bank.images, zeros.bank.licence, len(zeros.bank.fingerprint)) == (12, "MIT", 64)
    assert [name for name, model in described.items() if model.has_log_evidence] == WITH_EVIDENCE
    assert all(model.batch_invariant for model in described.values())
    assert described["gaussian"].bank is described["gaussian"].window is None


async def test_bytes_stand_for_pixels_from_minus_one_to_one(twin: Twin) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (2, *SHAPE)).astype(np.uint8)
    floats = grey.astype(np.float32) / np.float32(127.5) - 1
    as_bytes = await twin.call("denoise", grey, model="ideal", sigma=0.5)
    as_floats = await twin.call("denoise", floats, model="ideal", sigma=0.5)
    assert_same_bits(as_bytes, as_floats)
