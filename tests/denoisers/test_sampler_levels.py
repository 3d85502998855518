"""The levels that samplers visit, on networks' schedules, with the exact denoiser of N(0, I).

Its D(x) = a·x/(a² + s²) is linear, so a result is a weighted sum of noise draws, and an image's
standard deviation is the norm of their weights: 1 for a perfect sampler.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from tests.support.denoisers import run
from torch import Tensor

from els_service.denoisers.base import DenoiserInfo
from els_service.denoisers.levels import cosine
from els_service.denoisers.pretrained.timesteps import Timesteps
from els_service.denoisers.samplers import SAMPLERS, DenoiseCall, Options, options_for

BETAS: dict[str, dict[str, float]] = {
    "linear": {},
    "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {},
}
SCHEDULES = ["cosine", "narrow", *BETAS]
STEPS = (10, 20, 50)
WORST: dict[str, tuple[float, float, float]] = {
    # First order: too weak by about π²/8n where steps are even in angle, as here or nearly so.
    "ddim": (0.18, 0.09, 0.04),
    "ddim_released": (0.18, 0.09, 0.04),
    "euler": (0.26, 0.13, 0.06),
    "ddpm": (0.27, 0.16, 0.08),
    # Second order: too strong.
    "heun": (0.18, 0.04, 0.006),
    "dpmpp_2m": (0.17, 0.045, 0.006),
}
"""|standard deviation - 1| of 10, 20 and 50 steps at most."""


def description(schedule: str) -> DenoiserInfo:
    if schedule == "cosine":
        return DenoiserInfo("gaussian", (1, 1, 1))
    if schedule == "narrow":
        return DenoiserInfo("onnx", (1, 1, 1), trained_sigma=(0.01, 20.0))
    levels = DDPMScheduler(beta_schedule=schedule, **BETAS[schedule]).alphas_cumprod.double()
    timesteps = Timesteps(np.sqrt(1 / levels.numpy() - 1))
    return DenoiserInfo(
        "diffusers",
        (1, 1, 1),
        schedule="timesteps",
        own_schedule=timesteps.schedule,
        trained_sigma=(timesteps.min_sigma, timesteps.max_sigma),
    )


def exact(ask: DenoiseCall) -> Tensor:
    a, s = ask.level.a.item(), ask.level.s.item()
    return ask.x * (a / (a * a + s * s))


def weights(sampler: str, options: Options) -> Tensor:
    """Return the weight of each noise draw in the result."""

    def one_hot(draw: int) -> Tensor:
        return torch.eye(options.steps + 1, dtype=torch.float64)[draw].view(1, 1, 1, -1)

    return run(SAMPLERS[sampler](one_hot, options), exact)[1][-1].x.flatten()


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_images_of_unit_variance_come_out_as_strong_as_the_order_of_the_sampler_allows(
    schedule: str, sampler: str, n: int
) -> None:
    options = options_for(description(schedule), steps=n)
    deviation = weights(sampler, options).norm().item()
    assert abs(deviation - 1) <= WORST[sampler][STEPS.index(n)]


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_shrinks_by_the_cosine_of_each_step_s_angle(schedule: str, n: int) -> None:
    # With ᾱ = cos²θ and D = cos θ·x a step is x·cos(θ - θ').
    options = options_for(description(schedule), steps=n)
    times = np.arange(n, 0, -1) / n
    angles = [*np.arctan(options.schedule(times).sigma), 0.0]
    want = math.prod(math.cos(here - there) for here, there in itertools.pairwise(angles))
    assert weights("ddim", options)[0].item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("sampler", ["heun", "euler", "dpmpp_2m"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_levels_begin_at_80_and_end_at_002_or_where_the_network_s_training_does(
    schedule: str, sampler: str
) -> None:
    info = description(schedule)
    asks, _ = run(
        SAMPLERS[sampler](lambda _: torch.zeros(1, 1, 1, 1).double(), options_for(info, steps=20)),
        exact,
    )
    lowest, highest = info.trained_sigma or (0.0, math.inf)
    asked = [ask.level.sigma.item() for ask in asks]
    top = cosine(np.ones(1)).sigma.item()
    assert max(asked) == pytest.approx(min(highest, top), rel=1e-9)
    assert min(asked) == pytest.approx(max(lowest, 0.002), rel=1e-9)


def test_a_start_below_the_lowest_level_still_takes_falling_steps() -> None:
    options = Options(5, start=torch.zeros(1, 1, 1, 1).double(), start_time=1e-3)
    asks, _ = run(SAMPLERS["heun"](lambda _: torch.zeros(1, 1, 1, 1).double(), options), exact)
    asked = [ask.level.sigma.item() for ask in asks]
    assert asked == sorted(asked, reverse=True)
    assert asked[0] == pytest.approx(cosine(np.array([1e-3])).sigma.item())
