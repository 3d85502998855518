"""Samplers by name, what they need, and the loop that drives one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from els_service.denoisers.base import (
    Condition,
    Denoiser,
    DenoiserInfo,
    make_query,
)
from els_service.denoisers.levels import MAX_SIGMA as HIGHEST_SIGMA
from els_service.denoisers.levels import MIN_SIGMA
from els_service.denoisers.noise import Noise, seeded_noise
from els_service.denoisers.query_checks import largest_window
from els_service.denoisers.samplers.exploding import dpmpp_2m, euler, heun
from els_service.denoisers.samplers.preserving import ddim, ddim_released, ddpm
from els_service.denoisers.samplers.pyramid import plan_of, pyramid, pyramid_steps
from els_service.denoisers.samplers.trajectory import (
    MAX_SIGMA,
    DenoiseCall,
    Options,
    Resume,
    Step,
    Trajectory,
)
from els_service.errors import InvalidArgumentError


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
    "euler": euler,
    "dpmpp_2m": dpmpp_2m,
}
"""Samplers of any model; all images of a trajectory have one size."""
ALL_SAMPLERS: dict[str, Sampler] = {**SAMPLERS, "pyramid": pyramid}
"""With ``pyramid``, for models with ``DenoiserInfo.scales``."""
MAX_CHURN_NOISE = 2.0
"""Karras et al. 2022 use 1 to 1.007; far more is no denoising problem."""


def options_for(info: DenoiserInfo, **chosen: Any) -> Options:
    """Return options with the levels of a model: its schedule and its trained σ.

    Args:
        info: description of the model.
        **chosen: other fields of ``Options``.
    """
    lowest, highest = info.trained_sigma or (0.0, MAX_SIGMA)
    return Options(schedule=info.levels, trained=(lowest, min(highest, MAX_SIGMA)), **chosen)


def state_shape(
    sampler: str, shape: tuple[int, ...], options: Options | None = None
) -> tuple[int, ...]:
    """Return the shape of ``Step.state`` for images [B, C, H, W]; ``pyramid`` needs options."""
    if sampler == "pyramid" and options is not None:
        return shape[0], plan_of(options).numbers(shape[1])
    return (2 * shape[0], *shape[1:]) if sampler == "dpmpp_2m" else shape


def steps_of(sampler: str, options: Options) -> int:
    """Return the number of steps of a trajectory."""
    if sampler == "pyramid":
        return pyramid_steps(options)
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
    least = 2 if sampler in ("ddim_released", "pyramid") else 1
    if options.steps < least:
        raise InvalidArgumentError("steps", f"at least {least} for {sampler}", options.steps)
    if not 0 <= options.eta <= 1:
        raise InvalidArgumentError("eta", "0 <= eta <= 1", options.eta)
    _check_churn(options)
    if sampler == "pyramid":
        _check_pyramid(options)
        return
    _check_times(sampler, options)
    if options.scheduler:
        options.scheduler.check(sampler, options.steps)
        if options.times or options.start is not None:
            raise InvalidArgumentError("timesteps", "unset with times or start", "the folder's")
        if sampler == "ddpm" and options.eta != 1:
            raise InvalidArgumentError("eta", "1 or unset with the folder's timesteps", options.eta)


def _check_pyramid(options: Options) -> None:
    """Check that options have a plan, and nothing that ``pyramid`` does not read."""
    plan_of(options)
    if options.times:
        raise InvalidArgumentError("times", "none for pyramid", list(options.times[:8]))
    if not 0 < options.start_time <= 1:
        raise InvalidArgumentError("start_time", "0 < start_time <= 1", options.start_time)
    if options.scheduler:
        raise InvalidArgumentError("timesteps", "unset for pyramid", "the folder's")


def _check_churn(options: Options) -> None:
    """Check the four numbers of algorithm 2 of Karras et al. 2022."""
    if not 0 <= options.churn < math.inf:
        raise InvalidArgumentError("churn", "0 <= churn, finite", options.churn)
    lowest, highest = options.churn_min_sigma, options.churn_max_sigma
    if not 0 <= lowest < math.inf:
        raise InvalidArgumentError("churn_min_sigma", "0 <= churn_min_sigma, finite", lowest)
    if not lowest <= highest:
        raise InvalidArgumentError("churn_max_sigma", "at least churn_min_sigma", highest)
    if not 0 <= options.churn_noise <= MAX_CHURN_NOISE:
        expected = f"0 <= churn_noise <= {MAX_CHURN_NOISE:g}"
        raise InvalidArgumentError("churn_noise", expected, options.churn_noise)


def _check_times(sampler: str, options: Options) -> None:
    """Check times and start."""
    times = options.times
    if times:
        falling = all(later < earlier for earlier, later in itertools.pairwise(times))
        if not (falling and times[0] <= 1 and times[-1] > 0):
            raise InvalidArgumentError("times", "falling numbers, 0 < t <= 1", list(times[:8]))
        if len(times) != options.steps:
            raise InvalidArgumentError("steps", f"{len(times)}, as there are times", options.steps)
    if not 0 < options.start_time <= 1:
        raise InvalidArgumentError("start_time", "0 < start_time <= 1", options.start_time)
    if sampler == "ddim_released" and (times or options.start is not None):
        raise InvalidArgumentError("sampler", "another with times or start", sampler)
    _check_levels(options)


def _check_levels(options: Options) -> None:
    """Check that the levels of times or a start are in range, and that those of times fall."""
    if options.times:
        field, sigmas = "times", options.schedule(np.array(options.times)).sigma
    else:
        field, sigmas = "start_time", options.level(options.steps).sigma
    if not (np.diff(sigmas) < 0).all():
        raise InvalidArgumentError(field, "times of levels that fall", list(options.times[:8]))
    for sigma in (float(sigmas[0]), float(sigmas[-1])):
        if not MIN_SIGMA <= sigma <= HIGHEST_SIGMA:
            expected = f"levels with s/a from {MIN_SIGMA:g} to {HIGHEST_SIGMA:g}"
            raise InvalidArgumentError(field, expected, f"{sigma:g}")


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
    guidance: float = 1.0,
) -> Iterator[Step]:
    """Yield the steps of ``count`` images; the noise of image i has the key (seed, first + i).

    ``guidance`` is that of labels, for models with ``DenoiserInfo.label_guidance``.
    """
    options = options or options_for(denoiser.info)
    check_options(sampler, options)
    shape = denoiser.info.shape
    if options.pyramid is not None:
        shape = shape[0], *options.pyramid.sizes[-1]
    noise = seeded_noise(seed, count, shape, first)
    trajectory = ALL_SAMPLERS[sampler](noise, options)
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
            chosen = labels if event.label is None else event.label
            query = make_query(event.x.float(), event.level, chosen, windows, conditions)
            if guidance != 1:
                query.guidance = np.full(count, guidance)
            if event.unclipped:
                query.unclipped = np.ones(count, np.bool_)
            answer = denoiser.denoise(query).mean.double()


def windows_for(denoiser: Denoiser, call: DenoiseCall, scale: float = 1.0) -> list[int]:
    """Return the window that a sampler requests, or an empty list for the model's own.

    Args:
        denoiser: of the trajectory.
        call: of the sampler.
        scale: of the windows of the model's table.
    """
    table = denoiser.info.window
    if table is None or (call.window_level is None and scale == 1):
        return []
    largest = largest_window(denoiser.info, call.x.shape[2], call.x.shape[3])
    level = call.level if call.window_level is None else call.window_level
    own = int(table.at(level.sigma)[0])
    window = own if scale == 1 else 2 * math.floor(scale * own / 2) + 1
    return [min(window, largest)]
