"""A pyramid's cost is predicted by scale, so that a hopeless deadline is rejected at once."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.conftest import Recorder

from els_kernels import FoldedAttention
from els_service.denoisers.base import DenoiserInfo, Query, SizeRange
from els_service.denoisers.noise import seeded_noise
from els_service.denoisers.picture import PictureDenoiser
from els_service.denoisers.picture_banks import picture_bank
from els_service.denoisers.pyramids import PyramidPlan
from els_service.denoisers.samplers import Options, Resume, Step, evaluations_of
from els_service.denoisers.samplers.pyramid import pyramid
from els_service.engine.costs import CostModel
from els_service.engine.engine import Engine
from els_service.engine.request_context import RequestContext
from els_service.engine.sampling import SamplingRun
from els_service.errors import DeadlineExceededError
from els_service.server.requests.pyramid import expected_queries

SIZES, PATCH, STEPS = ((6, 8), (12, 16)), 3, 4
PICTURE = {"start": torch.zeros(1, 1, 12, 16, dtype=torch.float64), "start_time": 0.5}


class Priced(Recorder):
    """Predicts a millisecond for each pixel of a query, and nothing at the highest level."""

    @property
    def info(self) -> DenoiserInfo:
        sizes = SizeRange((3, 64), (3, 64))
        return DenoiserInfo(kind="recorder", shape=(1, 12, 16), sizes=sizes, label_count=2)

    def predict_seconds(self, query: Query) -> float:
        attended = (query.level.sigma < 1e5).sum()
        return 1e-3 * float(query.pixels[0].size * attended)


def options(**chosen: Any) -> Options:
    tileable = chosen.pop("tileable", False)
    return Options(steps=STEPS, pyramid=PyramidPlan(SIZES, PATCH, tileable=tileable), **chosen)


def run_of(given: Options, resume: Resume | None = None, **more: Any) -> SamplingRun:
    return SamplingRun(
        pyramid(seeded_noise(0, 1, (1, *SIZES[-1])), given, resume),
        np.full(1, -1),
        np.zeros(1, np.int64),
        evaluations_of("pyramid", given, resume),
        expected=expected_queries(given, 1, 1),
        **more,
    )


@pytest.mark.parametrize("chosen", [{}, {"tileable": True}, PICTURE], ids=["new", "tile", "start"])
def test_expected_queries_are_as_large_and_as_many_as_those_of_the_trajectory(
    chosen: dict[str, Any],
) -> None:
    given = options(**chosen)
    expected = [
        (query.pixels.shape, int(query.labels[0]), float(query.level.sigma[0]) >= 1e6)
        for query, times in expected_queries(given, 1, 1)
        for _ in range(times)
    ]
    trajectory, answer, found = pyramid(seeded_noise(0, 1, (1, *SIZES[-1])), given), None, []
    while True:
        try:
            event = trajectory.send(answer)
        except StopIteration:
            break
        answer = None
        if not isinstance(event, Step):
            uniform = float(event.level.sigma[0]) >= 1e6 * (1 - 1e-9)
            found.append((tuple(event.x.shape), event.label, uniform))
            answer = torch.zeros_like(event.x)
    assert found == expected


async def refusal(engine: Engine, run: SamplingRun, allowed_s: float) -> str:
    deadline = RequestContext(deadline=time.monotonic() + allowed_s)
    with pytest.raises(DeadlineExceededError) as caught:
        await anext(engine.sample("model", run, deadline))
    return str(caught.value)


async def test_a_hopeless_deadline_is_rejected_by_the_cost_of_all_scales(engine: Engine) -> None:
    recorder = Priced(0.0)
    engine.models.add("model", recorder)
    # Three calls of 48 and three of 192 pixels: 0.144 s and 0.576 s.
    text = await refusal(engine, run_of(options()), 0.25)
    assert "the trajectory evaluates model 8 times, 0.09 s each by prediction: 0.72 s; 0.2" in text
    resumed = Resume(5, torch.zeros(1, 192 + 48, dtype=torch.float64))
    text = await refusal(engine, run_of(options(), resumed), 0.2)
    assert "evaluates model 3 times, 0.192 s each by prediction: 0.576 s" in text
    assert recorder.batches == []


def test_explained_steps_count_with_the_sizes_of_their_scales() -> None:
    class Explainer(Priced):
        def predict_seconds(self, query: Query) -> float:
            return 10 * super().predict_seconds(query)

    loaded: Any = SimpleNamespace(model="model", denoiser=Priced(), costs=CostModel())
    explainer = SimpleNamespace(model="model", denoiser=Explainer(), costs=CostModel())
    loaded.derived = {"explain": explainer}
    run = run_of(options(), explain_steps=frozenset({2, 6, 8}))
    first = run.expected[0][0]
    # One step of 48 and two of 192 pixels.
    refused = r"explains model 3 times, 1\.44 s each by prediction: 4\.32 s"
    with pytest.raises(DeadlineExceededError, match=refused):
        run.check_time(loaded, first, deadline=1.0, now=0.0)
    run.check_time(loaded, first, deadline=5.0, now=0.0)


@pytest.mark.alone
async def test_the_predicted_seconds_of_a_sample_are_right_within_a_factor_of_two(
    engine: Engine,
) -> None:
    row, col = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
    picture = torch.stack([torch.sin(row / (3 + c) + col / 5) for c in range(3)])
    bank = picture_bank([picture], coarsest=12, scales=3)
    model = PictureDenoiser(FoldedAttention(bank.images), bank, patch=7, fold=0.2, steps=10)
    engine.models.add("model", model)
    given = Options(steps=10, pyramid=PyramidPlan(bank.sizes, 7))
    expected = expected_queries(given, 3, 1)
    took = []
    for seed in range(3):
        run = SamplingRun(
            pyramid(seeded_noise(seed, 1, (3, 48, 64)), given), np.full(1, -1),
            np.zeros(1, np.int64), 30, expected=expected, shape=(3, 48, 64),
        )  # fmt: skip
        began = time.perf_counter()
        async for _ in engine.sample("model", run):
            pass
        took.append(time.perf_counter() - began)
    loaded = engine.models.find("model").loaded
    assert loaded is not None
    predicted = sum(
        times * loaded.costs.seconds(model.predict_seconds(query)) for query, times in expected
    )
    assert 0.5 < predicted / min(took[1:]) < 2
