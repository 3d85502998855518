"""Trajectories: what a sampler yields and takes.

A sampler yields a ``DenoiseCall`` and is sent D(x), or yields a ``Step`` and is sent None. One
implementation serves both a plain loop (``registry.sample``) and an engine that batches the calls
of many trajectories. State is float64; all noise comes from the ``noise`` argument.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from els_service.denoisers.explanations import Explanation
from els_service.denoisers.folder_scheduler import FolderScheduler
from els_service.denoisers.levels import NoiseLevel, Schedule, cosine
from els_service.denoisers.pyramids import PyramidPlan

MAX_SIGMA = float(cosine(np.ones(1)).sigma[0])
"""Highest σ that the variance-exploding samplers start from: 80.2, that of the cosine schedule."""


@dataclass(frozen=True, eq=False)
class DenoiseCall:
    """A request for D of ``x`` [B, C, H, W] (float64) at ``level``."""

    x: Tensor
    level: NoiseLevel
    """Level of length 1, shared by all images."""
    window_level: NoiseLevel | None = None
    """Level for the window table; None means ``level``."""
    unclipped: bool = False
    """Whether a model that clips D to the range of its images returns it unclipped."""
    label: int | None = None
    """Label of all images: the scale of a pyramid; None for that of the request."""


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
    """State for resuming the sampler, of ``registry.state_shape``."""
    decoded: Tensor | None = None
    """Decoded images of ``x``, float32, at the last step of a latent model if requested."""
    explanations: tuple[Explanation, ...] = ()
    """Of each image, at the first call of the step, if requested."""
    scale: int = 0
    """Scale of ``x``, 0 the coarsest; sizes differ by scale."""
    scales: int = 1
    """Number of scales of the trajectory."""


@dataclass(frozen=True, eq=False)
class Resume:
    """Starting point of a resumed trajectory: index and state of a ``Step``."""

    index: int
    state: Tensor


Trajectory = Generator[DenoiseCall | Step, Tensor | None, None]


@dataclass(frozen=True, eq=False)
class Options:
    """Sampling options: steps, levels, start, and noise added by the steps."""

    steps: int = 20
    schedule: Schedule = cosine
    eta: float = 1.0
    """0 ≤ eta ≤ 1, for ddpm: 1 is ancestral sampling, 0 equals ddim."""
    churn: float = 0.0
    """S_churn ≥ 0, for heun and euler."""
    churn_min_sigma: float = 0.0
    """S_min: lowest σ that is churned."""
    churn_max_sigma: float = math.inf
    """S_max: highest σ that is churned."""
    churn_noise: float = 1.0
    """S_noise ≥ 0: scale of the noise that churn adds."""
    trained: tuple[float, float] = (0.0, MAX_SIGMA)
    """Lowest and highest σ of the levels that heun, euler and dpmpp_2m choose themselves."""
    times: tuple[float, ...] = ()
    """Times of the steps, falling, 0 < t ≤ 1; empty for evenly spaced ones. Sets ``steps``."""
    start: Tensor | None = None
    """Clean images [1 or B, C, H, W] float64 to start from; None for pure noise."""
    start_time: float = 1.0
    """Time to which ``start`` is noised and where the steps begin, 0 < t ≤ 1."""
    scheduler: FolderScheduler | None = None
    """Takes the steps of a diffusers scheduler; None for those of this package."""
    pyramid: PyramidPlan | None = None
    """Options of ``pyramid``, with ``steps`` at each scale; None for other samplers."""

    def level(self, i: int) -> NoiseLevel:
        """Return the level before the i-th step from the end: t = start_time·i/steps."""
        if self.times:
            return self.schedule(np.array([self.times[self.steps - i]]))
        return self.schedule(np.array([self.start_time * (i / self.steps)]))


def denoised(call: DenoiseCall) -> Generator[DenoiseCall | Step, Tensor | None, Tensor]:
    """Return the answer that a sampler is sent for a call.

    Raises:
        RuntimeError: It is sent None.
    """
    answer = yield call
    if answer is None:
        raise RuntimeError("expected the denoised images to be sent to the sampler, got None")
    return answer
