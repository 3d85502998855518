"""The sampler of pictures: one trajectory from noise for each scale of a pyramid.

x = α·x0 + σ·ε with σ = 1 - α, α rising linearly from 0. A finished scale fixes the low frequencies
of the next one. Steps have x/√(α² + σ²), so that states are comparable with those of the
variance-preserving samplers.
"""

from __future__ import annotations

import math
from collections.abc import Generator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from els_service.denoisers.levels import MAX_SIGMA, NoiseLevel
from els_service.denoisers.noise import Noise
from els_service.denoisers.pyramids import (
    PyramidPlan,
    Size,
    level_of,
    packed,
    unpacked,
    with_smooth_edges,
    wrapped,
)
from els_service.denoisers.samplers.trajectory import (
    DenoiseCall,
    Options,
    Resume,
    Step,
    Trajectory,
    denoised,
)


def pyramid(noise: Noise, options: Options, resume: Resume | None = None) -> Trajectory:
    """DDIM at each scale of a picture, coarse to fine (single-picture diffusion).

    Before the last step of a scale, D keeps only its difference from its own coarse version, added
    to the finished coarser scale: D ← up(c) + D - up(down(D)). A tileable picture is resampled on
    the torus, and before the last step of a scale rolled so that its edges lie where it is smooth.

    Raises:
        ValueError: The options have no plan.
    """
    plan = plan_of(options)
    total = pyramid_steps(options)
    done = (resume.index if resume else 0) + skipped_steps(options)
    scale, taken = divmod(done, options.steps)
    coarse: Tensor | None = None
    x: Tensor | None = None
    if resume:
        channels = _channels(resume.state, plan)
        if taken:
            x, before = unpacked(resume.state, plan, scale, channels)
            coarse = before if scale else None
        else:
            coarse, _ = unpacked(resume.state, plan, scale - 1, channels)
    while scale < plan.scales:
        if x is None:
            x = _begin(noise, options, plan, scale, taken)
        while taken < options.steps:
            (alpha, sigma), last = level_of(taken, options.steps), taken == options.steps - 1
            if last and plan.tileable and options.start is None:
                x = with_smooth_edges(x)
            x_hat = yield from _denoised(x, plan, scale, alpha, sigma)
            epsilon = (x - alpha * x_hat) / sigma
            if coarse is not None and not last:
                down = plan.resized(x_hat, plan.sizes[scale - 1])
                x_hat = x_hat + plan.resized(coarse - down, plan.sizes[scale])
            x_hat = _known(x_hat, options, plan, scale)
            taken, done = taken + 1, done + 1
            alpha, sigma = (1.0, 0.0) if last else level_of(taken, options.steps)
            x = alpha * x_hat + sigma * epsilon
            norm = math.hypot(alpha, sigma)
            index = done - skipped_steps(options)
            state = packed(x, None if last else coarse, plan)
            yield Step(
                index, total, x / norm, x_hat, (alpha / norm) ** 2, state,
                scale=scale, scales=plan.scales,
            )  # fmt: skip
        coarse, x, scale, taken = x, None, scale + 1, 0


def plan_of(options: Options) -> PyramidPlan:
    """Return the plan of options for ``pyramid``.

    Raises:
        ValueError: There is none.
    """
    if options.pyramid is None:
        raise ValueError("pyramid: expected a plan for the sampler pyramid, got none")
    return options.pyramid


def skipped_steps(options: Options) -> int:
    """Return how many steps of the coarsest scale a start leaves out."""
    if options.start is None:
        return 0
    last = options.steps - 1
    return min(last, math.floor((1 - options.start_time) * last + 1e-9))


def pyramid_steps(options: Options) -> int:
    """Return the number of steps of all scales."""
    return options.steps * plan_of(options).scales - skipped_steps(options)


def _channels(state: Tensor, plan: PyramidPlan) -> int:
    return state.shape[1] // plan.numbers(1)


def _begin(noise: Noise, options: Options, plan: PyramidPlan, scale: int, taken: int) -> Tensor:
    """Return x before the first step of a scale; its noise is the first of draw ``scale``."""
    size = plan.sizes[scale]
    drawn = noise(scale)
    batch, channels = drawn.shape[:2]
    part = drawn.flatten(1)[:, : channels * math.prod(size)]
    x = _mirrored(part.reshape(batch, channels, *size), plan)
    if not taken or options.start is None:
        return x
    alpha, sigma = level_of(taken, options.steps)
    return alpha * plan.resized(options.start, size) + sigma * x


def _denoised(
    x: Tensor, plan: PyramidPlan, scale: int, alpha: float, sigma: float
) -> Generator[DenoiseCall | Step, Tensor | None, Tensor]:
    """Return D of x: on the torus for a tileable picture, mirrored for a symmetric one."""
    border = plan.border
    around = wrapped(x, border, border) if border else x
    # At α = 0 the model has a level at which its posterior is uniform.
    scales = (alpha, sigma) if alpha else (sigma / MAX_SIGMA, sigma)
    level = NoiseLevel(np.array([scales[0]]), np.array([scales[1]]))
    x_hat = yield from denoised(DenoiseCall(around, level, label=scale))
    if border:
        x_hat = x_hat[..., border:-border, border:-border]
    return _mirrored(x_hat, plan)


def _mirrored(x: Tensor, plan: PyramidPlan) -> Tensor:
    """Return x with its left half mirrored to the right, if the plan is symmetric."""
    if not plan.symmetric:
        return x
    left = x[..., : (x.shape[3] + 1) // 2]
    return torch.cat([left, left[..., : x.shape[3] // 2].flip(3)], dim=3)


def _known(x_hat: Tensor, options: Options, plan: PyramidPlan, scale: int) -> Tensor:
    """Return D with the pixels that the mask keeps."""
    if plan.mask is None or options.start is None:
        return x_hat
    size = plan.sizes[scale]
    # A coarse pixel is kept if it is of kept pixels alone.
    drawn = _coarse_mask(plan.mask, size, plan)
    return torch.where(drawn, x_hat, plan.resized(options.start, size))


def _coarse_mask(mask: Tensor, size: Size, plan: PyramidPlan) -> Tensor:
    """Return which pixels of a scale hold a pixel that is drawn, bool [B, 1, h, w]."""
    if mask.shape[2:] == size:
        return mask > 0
    height, width = mask.shape[2:]
    rows, cols = -(-height // size[0]), -(-width // size[1])
    around = wrapped(mask, rows, cols) if plan.tileable else pad(mask, (cols, cols, rows, rows))
    grown = torch.nn.functional.max_pool2d(around, (2 * rows + 1, 2 * cols + 1), stride=1)
    return plan.resized(grown, size) > 0.5
