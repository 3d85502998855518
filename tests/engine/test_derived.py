"""Jacobian products and explanations through the engine: bits, bounds and deadlines."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.engine.conftest import Observed
from tests.support.denoisers import SHAPE, build, random_images
from tests.support.models_folder import DOCUMENTS, write_models
from tests.support.models_folder import SHAPE as BANK_SHAPE

from els_service.denoisers.analytic import AnalyticDenoiser
from els_service.denoisers.banks import make_bank
from els_service.denoisers.base import Denoised, Query, make_query
from els_service.denoisers.explanations import Explanation
from els_service.denoisers.levels import from_sigma
from els_service.denoisers.noise import seeded_noise
from els_service.denoisers.samplers import SAMPLERS, Options
from els_service.engine.derived import evidence_of, product_of, with_direction, with_evidence
from els_service.engine.engine import Engine
from els_service.engine.request_context import RequestContext
from els_service.engine.sampling import SamplingRun
from els_service.errors import DeadlineExceededError, InvalidArgumentError, UnavailableError
from els_service.repository import ModelRepository

COUNT = 6


def machine() -> AnalyticDenoiser:
    denoiser = build("els-zeros", make_bank(random_images((9, *SHAPE)).numpy()))
    assert isinstance(denoiser, AnalyticDenoiser)
    return denoiser


def query(count: int = COUNT) -> Query:
    return make_query(random_images((count, *SHAPE), 5), from_sigma([1.0]))


def direction(count: int = COUNT) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return random_images((count, *SHAPE), 6).numpy()


async def test_products_that_share_batches_keep_the_bits_that_they_have_alone(
    engine: Engine,
) -> None:
    denoiser = machine()
    engine.models.add("model", denoiser)
    served, x, g = engine.models.find("model"), query(), direction()
    want = denoiser.vjp(x, g)
    packed = with_direction(x, g)
    parts = [engine.derive(served, "vjp", packed[i : i + 1]) for i in range(COUNT)]
    answers = await asyncio.gather(*parts, engine.derive(served, "vjp", packed))
    *alone, together = map(product_of, answers)
    assert np.array_equal(together.product, want.product)
    for i, answer in enumerate(alone):
        assert np.array_equal(answer.product[0], want.product[i])
        assert np.array_equal(answer.mean[0], want.mean[i])


async def test_products_from_evidence_keep_their_bits_in_batches(engine: Engine) -> None:
    denoiser = machine()
    engine.models.add("model", denoiser)
    served, x, g = engine.models.find("model"), query(), direction()
    evidence = evidence_of(await engine.derive(served, "evidence", x))
    assert np.array_equal(evidence, denoiser.evidence(x))
    packed = with_evidence(with_direction(x, g), evidence)
    parts = [engine.derive(served, "jvp_again", packed[i : i + 1]) for i in range(COUNT)]
    *alone, together = map(
        product_of, await asyncio.gather(*parts, engine.derive(served, "jvp_again", packed))
    )
    want = denoiser.jvp(x, g)
    assert np.array_equal(together.product, want.product)
    assert np.array_equal(together.mean, want.mean)
    for i, answer in enumerate(alone):
        assert np.array_equal(answer.product[0], want.product[i])


async def test_explanations_that_share_batches_keep_the_bits_that_they_have_alone(
    engine: Engine,
) -> None:
    denoiser = machine()
    engine.models.add("model", denoiser)
    served, want = engine.models.find("model"), denoiser.explain(query(), 16)

    async def explain() -> list[Denoised]:
        return [found async for found in engine.derive_each(served, "explain", query(), 0)]

    for found in await asyncio.gather(explain(), explain()):
        for i, each in enumerate(found):
            assert isinstance(each, Explanation)
            assert np.array_equal(each.sources[0], want.sources[i])
            assert np.array_equal(each.weights[0], want.weights[i])
            assert np.array_equal(each.shares[0], want.shares[i])


async def test_an_explanation_holds_memory_until_its_reader_is_done(engine: Engine) -> None:
    engine.models.add("model", machine())
    served = engine.models.find("model")
    async with aclosing(engine.derive_each(served, "explain", query(), 1000)) as answers:
        await anext(answers)
        assert engine.memory.used == query().nbytes + 1000
        # Between two images nothing is queued.
        assert served.loaded is not None
        assert not served.loaded.derived["explain"].queue
    assert engine.memory.used == 0


def trajectory(explain_steps: set[int], steps: int = 4, count: int = 2) -> SamplingRun:
    return SamplingRun(
        SAMPLERS["heun"](seeded_noise(1, count, SHAPE), Options(steps=steps)),
        np.full(count, -1),
        np.zeros(count, np.int64),
        2 * steps - 1,
        explain_steps=frozenset(explain_steps),
    )


async def test_explained_steps_of_a_trajectory_have_the_first_query_of_the_step(
    engine: Engine,
) -> None:
    engine.models.add("model", machine())
    plain = [step async for step in engine.sample("model", trajectory(set()))]
    explained = [step async for step in engine.sample("model", trajectory({1, 4}))]
    for step, same in zip(explained, plain, strict=True):
        assert torch.equal(step.x, same.x)
        assert len(step.explanations) == (2 if step.index in (1, 4) else 0)
        for i, found in enumerate(step.explanations):
            # Heun's second query of a step is at another level.
            assert np.abs(found.pixels[0] - step.denoised[i].numpy()).max() <= 1e-5
    assert engine.memory.used == 0


async def test_a_trajectory_whose_explanations_cannot_be_in_time_is_rejected(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = machine()
    monkeypatch.setattr(denoiser, "predict_explain_seconds", lambda query: 1e6)
    engine.models.add("model", denoiser)
    soon = RequestContext(deadline=time.monotonic() + 60)
    with pytest.raises(DeadlineExceededError, match="explains model 2 times"):
        await anext(engine.sample("model", trajectory({3}), soon))
    assert len([step async for step in engine.sample("model", trajectory(set()), soon)]) == 4


async def test_a_variance_is_queued_like_an_answer(engine: Engine) -> None:
    denoiser = machine()
    engine.models.add("model", denoiser)
    answer = await engine.derive(engine.models.find("model"), "variance", query())
    assert np.array_equal(answer.pixels, denoiser.explain(query(), 3).variance)


async def test_a_product_that_cannot_be_in_time_is_rejected(engine: Engine) -> None:
    engine.models.add("model", machine())
    packed = with_direction(query(), direction())
    with pytest.raises(DeadlineExceededError):
        await engine.derive(
            engine.models.find("model"), "jvp", packed, RequestContext(deadline=0.0)
        )
    assert engine.memory.used == 0


async def test_a_product_of_a_wrong_shape_is_rejected(engine: Engine) -> None:
    engine.models.add("model", machine())
    wrong = make_query(random_images((1, 2, 3, 3)), from_sigma([1.0]))
    with pytest.raises(InvalidArgumentError, match="x: expected shape"):
        await engine.derive(engine.models.find("model"), "vjp", with_direction(wrong, wrong.pixels))


async def test_an_interrupted_engine_rejects_products(engine: Engine) -> None:
    engine.models.add("model", machine())
    engine.interrupt("the server drains")
    with pytest.raises(UnavailableError, match="the server drains"):
        await engine.derive(
            engine.models.find("model"), "vjp", with_direction(query(), direction())
        )


async def test_products_are_observed_as_batches_of_their_model(
    engine: Engine, observed: Observed
) -> None:
    engine.models.add("model", machine())
    packed = with_direction(query(), direction())
    await engine.derive(engine.models.find("model"), "vjp", packed)
    assert sum(observed.images) == COUNT
    names = {labels["model"] for name, labels, _ in engine.gauges() if name == "els_queue_items"}
    assert names == {"model"}


async def test_a_product_reloads_a_model_that_was_unloaded_to_save_memory(
    engine: Engine, tmp_path: Path
) -> None:
    root = write_models(tmp_path / "models", {"zeros": DOCUMENTS["zeros"]})
    await engine.models.load_all(ModelRepository(root))
    served = engine.models.find("zeros")
    x = np.random.default_rng(0).normal(size=(2, *BANK_SHAPE)).astype(np.float32)
    packed = with_direction(make_query(x, from_sigma([1.0])), x)
    want = await engine.derive(served, "jvp", packed)
    served.loaded = None
    got = await engine.derive(served, "jvp", packed)
    assert np.array_equal(got.pixels, want.pixels)
    assert served.loaded is not None
