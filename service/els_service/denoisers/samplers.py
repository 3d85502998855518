"""Reverse diffusion: samplers as generators that yield denoising calls and steps.

A sampler yields a ``DenoiseCall`` and is sent D(x), or yields a ``Step`` and is sent None. One
implementation serves both a plain loop (``sample``) and an engine that batches the calls of many
trajectories. State is float64; all noise comes from the ``noise`` argument.

Aligned sampling: t = i/n for i = n … 1, from x ~ N(0, I); the last step returns D(x).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from els_service.denoisers.base import Condition, Denoiser, make_query
from els_service.denoisers.levels import MIN_SIGMA, NoiseLevel, Schedule, cosine
from els_service.denoisers.noise import Noise, seeded_noise
from els_service.errors import InvalidArgumentError


@dataclass(frozen=True, eq=False)
class DenoiseCall:
    """A request for D of ``x`` [B, C, H, W] (float64) at ``level``."""

    x: Tensor
    level: NoiseLevel
    """Level of length 1, shared by all images."""
    window_level: NoiseLevel | None = None
    """Level for the window table; None means ``level``."""


@dataclass(frozen=True, eq=False)
class Step:
    """A completed step, ``index`` from 1 to ``total``; float64 [B, C, H, W]."""

    index: int
    total: int
    x: Tensor
    """State after the step, in variance-preserving scale; the result at the last step."""
    denoised: Tensor
    """D(x) used by the step; the result at the last step."""
    alpha_bar: float
    """ᾱ of ``x``; 1 at the last step."""
    state: Tensor
    """State for resuming the sampler: ``x``, for heun in its own scale."""
    decoded: Tensor | None = None
    """Decoded images of ``x``, float32, at the last step of a latent model if requested."""


@dataclass(frozen=True, eq=False)
class Resume:
    """Starting point of a resumed trajectory: index and state of a ``Step``."""

    index: int
    state: Tensor


Trajectory = Generator[DenoiseCall | Step, Tensor | None, None]


@dataclass(frozen=True)
class Options:
    """Sampling options: number of steps, schedule, and noise added by the steps."""

    steps: int = 20
    schedule: Schedule = cosine
    eta: float = 1.0
    """0 ≤ eta ≤ 1, for ddpm: 1 is ancestral sampling, 0 equals ddim."""
    churn: float = 0.0
    """0 ≤ churn ≤ steps, for heun: S_churn."""

    def level(self, i: int) -> NoiseLevel:
        """Return the level at t = i/steps."""
        return self.schedule(np.array([i / self.steps]))


def ddim(noise: Noise, options: Options, resume: Resume | None = None) -> Trajectory:
    """Deterministic DDIM (Song et al. 2021, eq. 12 with η = 0), aligned."""
    return _ancestral(noise, options, resume, eta=0.0)


def ddpm(noise: Noise, options: Options, resume: Resume | None = None) -> Trajectory:
    """Ancestral sampling (Ho et al. 2020; Song et al. 2021, eq. 12 and 16), aligned."""
    return _ancestral(noise, options, resume, eta=options.eta)


def _ancestral(noise: Noise, options: Options, resume: Resume | None, eta: float) -> Trajectory:
    n = options.steps
    taken, x = (resume.index, resume.state) if resume else (0, noise(0))
    for i in range(n - taken, 1, -1):
        here, there = options.level(i), options.level(i - 1)
        x_hat = yield from _denoised(DenoiseCall(x, here))
        (a, s), (a_next, s_next) = _scales(here), _scales(there)
        added = eta * s_next / s * math.sqrt(max(0.0, 1 - (a / a_next) ** 2))
        x = _move(x, x_hat, here, a_next, math.sqrt(max(0.0, s_next**2 - added**2)))
        if added:
            x = x + added * noise(n - i + 1)
        yield Step(n - i + 1, n, x, x_hat, a_next**2, x)
    x_hat = yield from _denoised(DenoiseCall(x, options.level(1)))
    yield Step(n, n, x_hat, x_hat, 1.0, x_hat)


def ddim_released(noise: Noise, options: Options, resume: Resume | None = None) -> Trajectory:
    """DDIM in the order of the published ELS code: i = n-1 … 1, and x at t = 0 is the result.

    The noise of t = 1 is used at t = (n-1)/n, and the window at t = i/n is that of t = (i+1)/n,
    because the published table is indexed from 0. Needed to reproduce the published figures.
    """
    n = options.steps
    taken, x = (resume.index, resume.state) if resume else (0, noise(0))
    for i in range(n - 1 - taken, 0, -1):
        here = options.level(i)
        x_hat = yield from _denoised(DenoiseCall(x, here, window_level=options.level(i + 1)))
        a_next, s_next = _scales(options.level(i - 1))
        x = _move(x, x_hat, here, a_next, s_next) if i > 1 else x_hat
        yield Step(n - i, n - 1, x, x_hat, a_next**2, x)


def heun(noise: Noise, options: Options, resume: Resume | None = None) -> Trajectory:
    """Heun's method with churn (Karras et al. 2022, algorithm 2), ρ = 7, in VE variables.

    From the schedule's σ at t = 1 down to 0.002; two evaluations per step except the last. Steps
    have √ᾱ·x, so that states are comparable with the variance-preserving samplers.
    """
    n = options.steps
    top = float(options.level(n).sigma[0])
    sigmas = _karras(top, max(0.002, MIN_SIGMA), n)
    taken, x = (resume.index, resume.state) if resume else (0, noise(0) * math.sqrt(1 + top**2))
    for i in range(taken, n):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        gamma = min(options.churn / n, math.sqrt(2) - 1)
        sigma_hat = sigma * (1 + gamma)
        if gamma:
            x = x + math.sqrt(sigma_hat**2 - sigma**2) * noise(i + 1)
        x_hat = yield from _denoised(DenoiseCall(x, _exploding(sigma_hat)))
        if sigma_next == 0:
            yield Step(n, n, x_hat, x_hat, 1.0, x_hat)
            return
        slope = (x - x_hat) * (1 / sigma_hat)
        euler = x + (sigma_next - sigma_hat) * slope
        second = yield from _denoised(DenoiseCall(euler, _exploding(sigma_next)))
        slope_next = (euler - second) * (1 / sigma_next)
        x = x + (sigma_next - sigma_hat) * 0.5 * (slope + slope_next)
        alpha_bar = 1 / (1 + sigma_next**2)
        yield Step(i + 1, n, x * math.sqrt(alpha_bar), x_hat, alpha_bar, x)


class Sampler(Protocol):
    """Starts or resumes a trajectory."""

    def __call__(self, noise: Noise, options: Options, resume: Resume | None = None) -> Trajectory:
        """Return the trajectory, whose noise comes from ``noise``."""
        ...


SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim,
    "ddim_released": ddim_released,
    "ddpm": ddpm,
    "heun": heun,
}


def steps_of(sampler: str, options: Options) -> int:
    """Return the number of steps of a trajectory."""
    return options.steps - (sampler == "ddim_released")


def evaluations_of(sampler: str, options: Options, resume: Resume | None = None) -> int:
    """Return the number of function evaluations (NFE) of a new or resumed trajectory."""
    left = steps_of(sampler, options) - (resume.index if resume else 0)
    return 2 * left - 1 if sampler == "heun" else left


def check_options(sampler: str, options: Options) -> None:
    """Check that a sampler supports these options.

    Raises:
        InvalidArgumentError: An option is out of range; names field, expected and got.
    """
    least = 2 if sampler == "ddim_released" else 1
    if options.steps < least:
        raise InvalidArgumentError("steps", f"at least {least} for {sampler}", options.steps)
    if not 0 <= options.eta <= 1:
        raise InvalidArgumentError("eta", "0 <= eta <= 1", options.eta)
    if not 0 <= options.churn <= options.steps:
        raise InvalidArgumentError("churn", f"0 <= churn <= steps = {options.steps}", options.churn)


def sample(
    denoiser: Denoiser,
    *,
    count: int = 1,
    first: int = 0,
    seed: int = 0,
    sampler: str = "ddim",
    options: Options | None = None,
    labels: int | list[int] = -1,
    conditions: Sequence[Condition] = (),
) -> Iterator[Step]:
    """Yield the steps of ``count`` images; the noise of image i has the key (seed, first + i)."""
    options = options or Options()
    check_options(sampler, options)
    noise = seeded_noise(seed, count, denoiser.info.shape, first)
    trajectory = SAMPLERS[sampler](noise, options)
    answer: Tensor | None = None
    while True:
        try:
            event = trajectory.send(answer)
        except StopIteration:
            return
        if isinstance(event, Step):
            answer = None
            yield event
        else:
            windows = windows_for(denoiser, event)
            query = make_query(event.x.float(), event.level, labels, windows, conditions)
            answer = denoiser.denoise(query).mean.double()


def windows_for(denoiser: Denoiser, call: DenoiseCall) -> list[int]:
    """Return the window that a sampler requests, or an empty list for the model's own."""
    table = denoiser.info.window
    if call.window_level is None or table is None:
        return []
    return [int(table.at(call.window_level.sigma)[0])]


def _denoised(call: DenoiseCall) -> Generator[DenoiseCall | Step, Tensor | None, Tensor]:
    answer = yield call
    if answer is None:
        raise RuntimeError("expected the denoised images to be sent to the sampler, got None")
    return answer


def _move(x: Tensor, x_hat: Tensor, here: NoiseLevel, a_next: float, s_next: float) -> Tensor:
    """Return a'·D + s'·ε̂ with ε̂ = (x - a·D)/s, the update of DDIM."""
    a, s = _scales(here)
    return a_next * x_hat + s_next * ((x - a * x_hat) * (1 / s))


def _scales(level: NoiseLevel) -> tuple[float, float]:
    return float(level.a[0]), float(level.s[0])


def _exploding(sigma: float) -> NoiseLevel:
    return NoiseLevel(np.array([1.0]), np.array([sigma]))


def _karras(highest: float, lowest: float, n: int, rho: float = 7.0) -> list[float]:
    """Return n levels from ``highest`` to ``lowest``, and 0 (Karras et al. 2022, eq. 5)."""
    high, low = highest ** (1 / rho), lowest ** (1 / rho)
    return [(high + i / max(1, n - 1) * (low - high)) ** rho for i in range(n)] + [0.0]
