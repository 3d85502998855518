"""Samplers against textbook loops, and against priors whose flow is known."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from tests.support.denoisers import Answer, answers_of, build, random_images, run
from torch import Tensor

from els_service.denoisers.banks import Bank
from els_service.denoisers.base import make_query
from els_service.denoisers.closed_forms import GaussianDenoiser
from els_service.denoisers.levels import from_alpha_bar, from_time
from els_service.denoisers.noise import seeded_noise
from els_service.denoisers.samplers import (
    SAMPLERS,
    DenoiseCall,
    Options,
    check_options,
    ddim,
    ddim_released,
    ddpm,
    heun,
    sample,
)
from els_service.errors import InvalidArgumentError

SHAPE = (1, 2, 3)
MEAN, VARIANCE = 0.3, 0.25


@dataclass
class Recorder:
    """Noise that keeps which draws were asked for; those of the steps are ``later`` times it."""

    shape: tuple[int, int, int] = SHAPE
    later: float = 1.0
    draws: list[int] = field(default_factory=list)

    def __call__(self, number: int) -> Tensor:
        self.draws.append(number)
        return seeded_noise(3, 2, self.shape)(number) * (self.later if number else 1.0)


def prior(mean: float = MEAN, variance: float = VARIANCE) -> Answer:
    """The posterior mean under N(mean, variance), in float64."""

    def answer(ask: DenoiseCall) -> Tensor:
        a, s = ask.level.a.item(), ask.level.s.item()
        gain = a * variance / (a * a * variance + s * s)
        return mean + gain * (ask.x - a * mean)

    return answer


def alpha_bar(t: float) -> float:
    return math.cos(math.pi * t / 2.016) ** 2 if t else 1.0


def exact_flow(x: Tensor) -> Tensor:
    """Where the probability flow of the prior takes N(0, I) noise at t = 1 of the cosine schedule.

    dx/dσ = (x - D)/σ = (x - μ) σ/(v + σ²), hence x - μ ∝ √(v + σ²).
    """
    exploding = x / math.sqrt(alpha_bar(1))
    sigma2 = (1 - alpha_bar(1)) / alpha_bar(1)
    return MEAN + (exploding - MEAN) * math.sqrt(VARIANCE / (VARIANCE + sigma2))


def textbook_ddim(x: Tensor, denoiser: GaussianDenoiser, times: list[float]) -> list[Tensor]:
    states = []
    for t, t_next in itertools.pairwise(times):
        here, there = alpha_bar(t), alpha_bar(t_next)
        mean = denoiser.denoise(make_query(x.float(), from_alpha_bar([here]))).mean.double()
        eps = (x - math.sqrt(here) * mean) / math.sqrt(1 - here)
        ratio = math.sqrt(there / here)
        x = ratio * x + (math.sqrt(1 - there) - ratio * math.sqrt(1 - here)) * eps
        states.append(x)
    return states


@pytest.mark.parametrize("n", [2, 5, 20])
@pytest.mark.parametrize("sampler", ["ddim", "ddim_released"])
def test_ddim_is_the_textbook_loop(sampler: str, n: int) -> None:
    denoiser = GaussianDenoiser(SHAPE, random_images(SHAPE, 1), random_images(SHAPE, 2).square())
    first = n - 1 if sampler == "ddim_released" else n
    start = seeded_noise(4, 3, SHAPE)(0)
    want = textbook_ddim(start, denoiser, [i / n for i in range(first, -1, -1)])
    steps = list(sample(denoiser, count=3, seed=4, sampler=sampler, options=Options(n)))
    assert len(steps) == len(want)
    for step, state in zip(steps, want, strict=True):
        # D is float32; where x differs in its last bit of float64, x.float() may round elsewhere,
        # and 1/√ᾱ = 80 at t = 1 makes 80·eps32 = 1e-5 of it.
        torch.testing.assert_close(step.x, state, rtol=0, atol=1e-5)


def order(sampler: str, n: int) -> float:
    """By what power of two the error falls when the number of steps doubles."""
    noise = Recorder()
    want = exact_flow(noise(0))
    errors = [
        (run(SAMPLERS[sampler](noise, Options(steps)), prior())[1][-1].x - want).abs().max().item()
        for steps in (n, 2 * n)
    ]
    return math.log2(errors[0] / errors[1])


def test_ddim_converges_to_the_probability_flow_at_order_1() -> None:
    assert order("ddim", 200) == pytest.approx(1, abs=0.1)


def test_heun_converges_to_the_probability_flow_at_order_2() -> None:
    assert order("heun", 40) == pytest.approx(2, abs=0.2)


def test_heun_of_many_steps_is_the_probability_flow() -> None:
    noise = Recorder()
    last = run(heun(noise, Options(600)), prior())[1][-1]
    # 10/n² of truncation, and σ²/2v = 8e-6 as the last answer, at σ = .002, is the mean.
    torch.testing.assert_close(last.x, exact_flow(noise(0)), rtol=0, atol=5e-5)


@pytest.mark.parametrize("sampler", ["ddpm", "heun"])
def test_ancestral_and_churned_sampling_draw_from_the_prior(sampler: str) -> None:
    noise = seeded_noise(1, 1, (1, 100, 100))
    options = Options(300, eta=1.0, churn=60.0)
    x = run(SAMPLERS[sampler](noise, options), prior())[1][-1].x
    # Five standard errors of 10⁴ samples, and 6/n of the variance for steps of finite size.
    assert x.mean().item() == pytest.approx(MEAN, abs=5 * math.sqrt(VARIANCE / 1e4))
    assert x.var().item() == pytest.approx(VARIANCE, rel=5 * math.sqrt(2 / 1e4) + 6 / 300)


def test_ddpm_with_eta_0_is_ddim_and_draws_no_noise() -> None:
    noise = Recorder()
    _, got = run(ddpm(noise, Options(6, eta=0.0)), prior())
    _, want = run(ddim(noise, Options(6)), prior())
    assert set(noise.draws) == {0}
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine.x, theirs.x)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_a_step_of_ddpm_adds_the_noise_of_its_number(eta: float) -> None:
    n = 5
    noise = Recorder()
    _, noisy = run(ddpm(noise, Options(n, eta=eta)), prior())
    assert noise.draws == [0, 1, 2, 3, 4]
    _, quiet = run(ddpm(Recorder(later=0.0), Options(n, eta=eta)), prior())
    here, there = alpha_bar(1), alpha_bar(1 - 1 / n)
    # Song et al. 2021, eq. 16.
    sigma = eta * math.sqrt((1 - there) / (1 - here)) * math.sqrt(1 - here / there)
    torch.testing.assert_close(noisy[0].x - quiet[0].x, sigma * Recorder()(1))


def test_a_step_of_ddpm_leaves_the_noise_level_of_its_time() -> None:
    # With D = 0 the state is noise alone; each step must leave it with variance 1 - ᾱ.
    noise = seeded_noise(1, 1, (1, 100, 100))
    asks, _ = run(ddpm(noise, Options(6)), lambda ask: torch.zeros_like(ask.x))
    for ask in asks[1:]:
        variance = ask.x.var().item()
        assert variance == pytest.approx(
            (1 - ask.level.alpha_bar).item(), rel=5 * math.sqrt(2 / 1e4)
        )


def test_churn_is_noise_of_the_steps_number_at_a_raised_level() -> None:
    n, churn = 4, 1.0
    noise = Recorder()
    asks, _ = run(heun(noise, Options(n, churn=churn)), prior())
    assert noise.draws == [0, 1, 2, 3, 4]
    quiet, _ = run(heun(Recorder(later=0.0), Options(n, churn=churn)), prior())
    sigma = math.sqrt(1 / alpha_bar(1) - 1)
    raised = sigma * (1 + churn / n)
    assert asks[0].level.s.item() == pytest.approx(raised, rel=1e-12)
    added = math.sqrt(raised**2 - sigma**2) * Recorder()(1)
    torch.testing.assert_close(asks[0].x - quiet[0].x, added)


def test_churn_never_raises_a_level_by_more_than_root_2() -> None:
    asks, _ = run(heun(Recorder(), Options(2, churn=2.0)), prior())
    sigma = math.sqrt(1 / alpha_bar(1) - 1)
    assert asks[0].level.s.item() == pytest.approx(math.sqrt(2) * sigma, rel=1e-12)


def test_heun_follows_the_levels_of_karras_with_two_answers_a_step_but_the_last() -> None:
    n = 5
    asks, steps = run(heun(Recorder(), Options(n)), prior())
    top = math.sqrt(1 / alpha_bar(1) - 1)
    ends = top ** (1 / 7), 0.002 ** (1 / 7)
    sigma = [(ends[0] + i / (n - 1) * (ends[1] - ends[0])) ** 7 for i in range(n)]
    asked = [ask.level.s.item() for ask in asks]
    assert asked == pytest.approx(sorted(sigma + sigma[1:], reverse=True), rel=1e-12)
    assert all(ask.level.a.item() == 1 for ask in asks)
    reported = [step.alpha_bar for step in steps]
    assert reported == pytest.approx([1 / (1 + s * s) for s in sigma[1:]] + [1], rel=1e-12)
    for step, ask in zip(steps[:-1], asks[2::2], strict=True):
        torch.testing.assert_close(step.x, ask.x * math.sqrt(step.alpha_bar))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_starts_from_the_same_noise_in_its_own_scale(sampler: str) -> None:
    asks, _ = run(SAMPLERS[sampler](Recorder(), Options(4)), prior())
    level = asks[0].level
    # ddim_released takes noise meant for t = 1 as it is; all that preserve variance do.
    scale = math.sqrt(level.a.item() ** 2 + level.s.item() ** 2)
    torch.testing.assert_close(asks[0].x, scale * Recorder()(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("sampler", ["ddim", "ddim_released", "heun"])
def test_without_churn_the_start_is_all_the_noise_there_is(sampler: str) -> None:
    noise = Recorder()
    run(SAMPLERS[sampler](noise, Options(5)), prior())
    assert noise.draws == [0]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_noise_of_zeros_stays_where_the_prior_has_its_mean(sampler: str) -> None:
    options = Options(5, eta=1.0, churn=2.0)
    zeros = torch.zeros(1, *SHAPE, dtype=torch.float64)
    asks, steps = run(SAMPLERS[sampler](lambda _: zeros, options), prior(mean=0.0))
    assert all(torch.equal(x, zeros) for x in [e.x for e in asks] + [e.x for e in steps])


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("n", [2, 3, 7])
def test_steps_are_counted_from_1_and_the_last_is_the_denoised_image(sampler: str, n: int) -> None:
    asks, steps = run(SAMPLERS[sampler](Recorder(), Options(n, churn=1.0)), prior())
    total = n - 1 if sampler == "ddim_released" else n
    assert [step.index for step in steps] == list(range(1, total + 1))
    assert {step.total for step in steps} == {total}
    assert torch.equal(steps[-1].x, steps[-1].denoised)
    torch.testing.assert_close(steps[-1].denoised, prior()(asks[-1]))
    assert steps[-1].alpha_bar == 1
    kept = [step.alpha_bar for step in steps]
    assert kept == sorted(kept)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun"])
def test_a_single_step_is_the_denoised_noise(sampler: str) -> None:
    asks, steps = run(SAMPLERS[sampler](Recorder(), Options(1)), prior())
    assert len(asks) == len(steps) == 1
    assert asks[0].level.alpha_bar.item() == pytest.approx(alpha_bar(1), rel=1e-12)
    assert torch.equal(steps[0].x, prior()(asks[0]))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_aligned_sampling_asks_at_every_time_from_1_down(sampler: str) -> None:
    asks, steps = run(SAMPLERS[sampler](Recorder(), Options(20)), prior())
    times = np.arange(20, 0, -1) / 20
    asked = [ask.level.alpha_bar.item() for ask in asks]
    np.testing.assert_allclose(asked, [alpha_bar(t) for t in times], rtol=1e-12)
    reported = [step.alpha_bar for step in steps]
    np.testing.assert_allclose(reported, [alpha_bar(t - 0.05) for t in times], rtol=1e-12)
    assert all(ask.window_level is None for ask in asks)


def test_the_released_order_leaves_out_time_1_and_looks_its_windows_up_a_step_too_early(
    labelled: Bank,
) -> None:
    asks, _ = run(ddim_released(Recorder(), Options(20)), prior())
    times = np.arange(19, 0, -1) / 20
    for ask, t in zip(asks, times, strict=True):
        assert ask.window_level is not None
        assert ask.level.alpha_bar.item() == pytest.approx(alpha_bar(t), rel=1e-12)
        looked_up = ask.window_level.alpha_bar.item()
        assert looked_up == pytest.approx(alpha_bar(t + 0.05), rel=1e-12)


def test_sampling_draws_image_i_from_seed_and_i_with_a_label_each(labelled: Bank) -> None:
    denoiser = build("els-zeros", labelled)
    options, labels = Options(3), [0, -1, 2]
    steps = list(sample(denoiser, count=3, seed=9, options=options, labels=labels))
    trajectory = ddim(seeded_noise(9, 3, labelled.shape), options)
    _, want = run(trajectory, answers_of(denoiser, labels))
    assert all(torch.equal(step.x, other.x) for step, other in zip(steps, want, strict=True))


def test_sampling_asks_the_windows_that_the_sampler_wants(labelled: Bank) -> None:
    class Spy:
        def __init__(self) -> None:
            self.inner = build("local-zeros", labelled)
            self.info, self.windows = self.inner.info, list[int]()

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

        # A spy: only what sample() asks of it.
        def denoise(self, query):  # type: ignore[no-untyped-def]
            self.windows += query.windows.tolist()
            return self.inner.denoise(query)

    spy = Spy()
    # The spy is no whole denoiser.
    list(sample(spy, sampler="ddim_released"))  # type: ignore[arg-type]
    assert spy.info.window is not None
    table = spy.info.window.at(from_time(np.arange(20, 1, -1) / 20).sigma)
    assert spy.windows == table.tolist()
    assert spy.windows[::-1] == [3, 5, 5, 7, 7, 9, 9, 9, *[11] * 11]


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        ("ddim", Options(0), "steps: expected at least 1 for ddim, got 0"),
        ("heun", Options(-1), "steps: expected at least 1 for heun, got -1"),
        ("ddim_released", Options(1), "steps: expected at least 2 for ddim_released, got 1"),
        ("ddpm", Options(5, eta=1.5), "eta: expected 0 <= eta <= 1, got 1.5"),
        ("ddpm", Options(5, eta=-0.1), "eta: expected .*, got -0.1"),
        ("ddpm", Options(5, eta=math.nan), "eta: expected .*, got nan"),
        ("heun", Options(5, churn=-1), "churn: expected 0 <= churn, finite, got -1"),
        ("heun", Options(5, churn=math.inf), "churn: expected .*, got inf"),
        ("heun", Options(5, churn_min_sigma=-1), "churn_min_sigma: expected 0 <= churn_min_sigma"),
        ("heun", Options(5, churn_max_sigma=-1), "churn_max_sigma: expected at least churn_min"),
        (
            "heun",
            Options(5, churn_noise=2.5),
            "churn_noise: expected 0 <= churn_noise <= 2",
        ),
        ("ddim", Options(2, times=(0.5, 0.5)), "times: expected falling numbers, 0 < t <= 1"),
        ("ddim", Options(2, times=(0.5, 0.0)), "times: expected falling numbers"),
        ("ddim", Options(1, times=(math.nan,)), "times: expected falling numbers"),
        ("ddim", Options(3, times=(0.5, 0.1)), "steps: expected 2, as there are times, got 3"),
        ("ddim", Options(1, times=(1e-9,)), "times: expected levels with s/a from 0.0001"),
        ("ddim", Options(1, start_time=1.5), "start_time: expected 0 < start_time <= 1, got 1.5"),
        ("ddim_released", Options(2, times=(0.5, 0.1)), "sampler: expected another with times"),
        ("heun", Options(5, churn=math.nan), "churn: expected .*, got nan"),
    ],
)
def test_options_out_of_range_are_refused(sampler: str, options: Options, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        check_options(sampler, options)


def test_a_sampler_that_is_sent_no_answer_says_so() -> None:
    trajectory = ddim(Recorder(), Options(3))
    assert isinstance(next(trajectory), DenoiseCall)
    with pytest.raises(RuntimeError, match="expected the denoised images"):
        next(trajectory)
