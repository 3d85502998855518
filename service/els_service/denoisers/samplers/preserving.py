"""Samplers in variance-preserving variables, x = a·x0 + s·ε with a² + s² = 1.

Aligned sampling: t = i/n for i = n … 1, from x ~ N(0, I); the last step returns D(x).
"""

from __future__ import annotations

import math

from torch import Tensor

from els_service.denoisers.folder_scheduler import FolderScheduler
from els_service.denoisers.levels import NoiseLevel
from els_service.denoisers.noise import Noise
from els_service.denoisers.samplers.trajectory import (
    DenoiseCall,
    Options,
    Resume,
    Step,
    Trajectory,
    denoised,
)


def ddim(noise: Noise, options: Options, resume: Resume | None = None) -> Trajectory:
    """Deterministic DDIM (Song et al. 2021, eq. 12 with η = 0), aligned."""
    if options.scheduler:
        return _ddim_of_folder(noise, options, options.scheduler, resume)
    return _ancestral(noise, options, resume, eta=0.0)


def ddpm(noise: Noise, options: Options, resume: Resume | None = None) -> Trajectory:
    """Ancestral sampling (Ho et al. 2020; Song et al. 2021, eq. 12 and 16), aligned."""
    if options.scheduler:
        return _ddpm_of_folder(noise, options, options.scheduler, resume)
    return _ancestral(noise, options, resume, eta=options.eta)


def _ancestral(noise: Noise, options: Options, resume: Resume | None, eta: float) -> Trajectory:
    n = options.steps
    taken, x = (resume.index, resume.state) if resume else (0, _begin(noise, options))
    for i in range(n - taken, 1, -1):
        here, there = options.level(i), options.level(i - 1)
        x_hat = yield from denoised(DenoiseCall(x, here))
        (a, s), (a_next, s_next) = _scales(here), _scales(there)
        added = eta * s_next / s * math.sqrt(max(0.0, 1 - (a / a_next) ** 2))
        x = _move(x, x_hat, here, a_next, math.sqrt(max(0.0, s_next**2 - added**2)))
        if added:
            x = x + added * noise(n - i + 1)
        yield Step(n - i + 1, n, x, x_hat, a_next**2, x)
    x_hat = yield from denoised(DenoiseCall(x, options.level(1)))
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
        x_hat = yield from denoised(DenoiseCall(x, here, window_level=options.level(i + 1)))
        a_next, s_next = _scales(options.level(i - 1))
        x = _move(x, x_hat, here, a_next, s_next) if i > 1 else x_hat
        yield Step(n - i, n - 1, x, x_hat, a_next**2, x)


def _ddim_of_folder(
    noise: Noise, options: Options, scheduler: FolderScheduler, resume: Resume | None
) -> Trajectory:
    """DDIM as a ``DDIMScheduler`` takes it: ε comes from D before D is clipped."""
    n, grid = options.steps, scheduler.preserving(options.steps)
    taken, x = (resume.index, resume.state) if resume else (0, noise(0))
    for i in range(taken, n):
        (a, s), (a_next, s_next) = grid[i], grid[i + 1]
        whole = yield from denoised(DenoiseCall(x, NoiseLevel.of([grid[i]]), unclipped=True))
        x_hat = scheduler.clipped(whole)
        x = a_next * x_hat + s_next * ((x - a * whole) * (1 / s))
        yield Step(i + 1, n, x, x_hat if i + 1 < n else x, a_next**2, x)


def _ddpm_of_folder(
    noise: Noise, options: Options, scheduler: FolderScheduler, resume: Resume | None
) -> Trajectory:
    """Ancestral sampling as a ``DDPMScheduler`` takes it (Ho et al. 2020, eq. 7), with η = 1.

    ``variance_type`` gives the variance of a step: β̃ of eq. 7, or β = 1 - ᾱ/ᾱ'. None is added by
    the last step, which ends at ᾱ = 1.
    """
    n, grid = options.steps, scheduler.preserving(options.steps, clean=True)
    taken, x = (resume.index, resume.state) if resume else (0, noise(0))
    for i in range(taken, n):
        (a, s), (a_next, s_next) = grid[i], grid[i + 1]
        x_hat = yield from denoised(DenoiseCall(x, NoiseLevel.of([grid[i]])))
        beta = max(0.0, 1 - (a / a_next) ** 2)
        kept = (a / a_next) * (s_next / s) ** 2
        x = (a_next * beta / s**2) * x_hat + kept * x
        if i + 1 < n:
            added = math.sqrt(beta) * (1.0 if scheduler.large_variance else s_next / s)
            x = x + added * noise(i + 1)
        yield Step(i + 1, n, x, x_hat if i + 1 < n else x, a_next**2, x)


def _begin(noise: Noise, options: Options) -> Tensor:
    if options.start is None:
        return noise(0)
    a, s = _scales(options.level(options.steps))
    return a * options.start + s * noise(0)


def _move(x: Tensor, x_hat: Tensor, here: NoiseLevel, a_next: float, s_next: float) -> Tensor:
    """Return a'·D + s'·ε̂ with ε̂ = (x - a·D)/s, the update of DDIM."""
    a, s = _scales(here)
    return a_next * x_hat + s_next * ((x - a * x_hat) * (1 / s))


def _scales(level: NoiseLevel) -> tuple[float, float]:
    return float(level.a[0]), float(level.s[0])
