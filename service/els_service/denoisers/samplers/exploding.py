"""Samplers in variance-exploding variables, x = x0 + σ·ε, as in EDM and k-diffusion.

By default they visit the levels of Karras et al. 2022 (eq. 5, ρ = 7), from σ at t = 1 but at
most 80.2 down to 0.002 or the lowest trained σ, and then 0. Steps have √ᾱ·x, so that states are
comparable with those of the variance-preserving samplers.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from els_service.denoisers.levels import MIN_SIGMA, NoiseLevel
from els_service.denoisers.noise import Noise
from els_service.denoisers.samplers.trajectory import (
    DenoiseCall,
    Options,
    Resume,
    Step,
    Trajectory,
    denoised,
)

LOWEST_SIGMA = max(0.002, MIN_SIGMA)
"""Lowest σ before 0 (Karras et al. 2022, table 1)."""


def heun(noise: Noise, options: Options, resume: Resume | None = None) -> Trajectory:
    """Heun's method with churn (Karras et al. 2022, algorithm 2).

    Two evaluations per step except the last.
    """
    return _with_churn(noise, options, resume, second_order=True)


def euler(noise: Noise, options: Options, resume: Resume | None = None) -> Trajectory:
    """Euler's method with churn (Karras et al. 2022, algorithm 2 without its correction)."""
    return _with_churn(noise, options, resume, second_order=False)


def dpmpp_2m(noise: Noise, options: Options, resume: Resume | None = None) -> Trajectory:
    """DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++", algorithm 2), midpoint, data prediction.

    One evaluation per step; the first and last steps are of first order. A state for resuming holds
    x and the D of the step before.
    """
    n, sigmas = options.steps, _sigmas(options, "dpmpp_2m")
    unclipped = options.scheduler is not None
    old: Tensor | None = None
    if resume:
        taken = resume.index
        x, old = resume.state.chunk(2)
    else:
        taken, x = 0, _begin(noise, options, "dpmpp_2m", sigmas[0])
    for i in range(taken, n):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        x_hat = yield from denoised(DenoiseCall(x, _exploding(sigma), unclipped=unclipped))
        if sigma_next == 0:
            yield Step(n, n, x_hat, x_hat, 1.0, torch.cat([x_hat, x_hat]))
            return
        ratio, extrapolated = sigma_next / sigma, x_hat
        if old is not None:
            # 1/(2r) with r the ratio of the steps in log σ.
            weight = 0.5 * math.log(sigma / sigma_next) / math.log(sigmas[i - 1] / sigma)
            extrapolated = (1 + weight) * x_hat - weight * old
        x, old = ratio * x + (1 - ratio) * extrapolated, x_hat
        alpha_bar = 1 / (1 + sigma_next**2)
        state = torch.cat([x, x_hat])
        yield Step(i + 1, n, x * math.sqrt(alpha_bar), x_hat, alpha_bar, state)


def _with_churn(
    noise: Noise, options: Options, resume: Resume | None, *, second_order: bool
) -> Trajectory:
    n, sigmas = options.steps, _sigmas(options, "euler")
    unclipped = options.scheduler is not None
    if resume:
        taken, x = resume.index, resume.state
    else:
        taken, x = 0, _begin(noise, options, "euler", sigmas[0])
    for i in range(taken, n):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        churned = options.churn_min_sigma <= sigma <= options.churn_max_sigma
        gamma = min(options.churn / n, math.sqrt(2) - 1) if churned else 0.0
        sigma_hat = sigma * (1 + gamma)
        if gamma:
            added = options.churn_noise * math.sqrt(sigma_hat**2 - sigma**2)
            x = x + added * noise(i + 1)
        x_hat = yield from denoised(DenoiseCall(x, _exploding(sigma_hat), unclipped=unclipped))
        if sigma_next == 0:
            yield Step(n, n, x_hat, x_hat, 1.0, x_hat)
            return
        slope = (x - x_hat) * (1 / sigma_hat)
        predicted = x + (sigma_next - sigma_hat) * slope
        if second_order:
            second = yield from denoised(DenoiseCall(predicted, _exploding(sigma_next)))
            slope_next = (predicted - second) * (1 / sigma_next)
            x = x + (sigma_next - sigma_hat) * 0.5 * (slope + slope_next)
        else:
            x = predicted
        alpha_bar = 1 / (1 + sigma_next**2)
        yield Step(i + 1, n, x * math.sqrt(alpha_bar), x_hat, alpha_bar, x)


def _begin(noise: Noise, options: Options, sampler: str, sigma: float) -> Tensor:
    if options.start is not None:
        return options.start + sigma * noise(0)
    if options.scheduler:
        return noise(0) * options.scheduler.begin(sampler, sigma)
    return noise(0) * math.sqrt(1 + sigma**2)


def _sigmas(options: Options, sampler: str) -> list[float]:
    """Return the levels of the steps, falling, and 0."""
    if options.scheduler:
        return options.scheduler.exploding(sampler, options.steps)
    if options.times:
        return [*options.schedule(np.array(options.times)).sigma.tolist(), 0.0]
    lowest, highest = options.trained
    top = min(float(options.level(options.steps).sigma[0]), highest)
    # A start below or close to the lowest level still takes falling steps.
    return karras(top, min(max(LOWEST_SIGMA, lowest), top / 2), options.steps)


def _exploding(sigma: float) -> NoiseLevel:
    return NoiseLevel(np.array([1.0]), np.array([sigma]))


def karras(highest: float, lowest: float, n: int, rho: float = 7.0) -> list[float]:
    """Return n levels from ``highest`` to ``lowest``, and 0 (Karras et al. 2022, eq. 5)."""
    high, low = highest ** (1 / rho), lowest ** (1 / rho)
    return [(high + i / max(1, n - 1) * (low - high)) ** rho for i in range(n)] + [0.0]
