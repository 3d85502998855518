"""Estimates of a model's speed on this machine before its first request."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import numpy as np
import torch

from els_service.denoisers.base import Compiling, Condition, Denoiser, Query, make_query
from els_service.denoisers.levels import NoiseLevel
from els_service.engine.costs import CostModel
from els_service.errors import InvalidArgumentError

STEPS = 20
"""Steps of the sample whose cost is reported."""

_WARM_UP_S = 2.0
"""Estimated seconds of the cheapest query above which a model is not warmed up."""
_TIMED_S = 0.1
"""Maximum estimated seconds of the query that is timed, twice."""


def warm(denoiser: Denoiser) -> CostModel:
    """Run small queries, so that the first request does not pay for one-time costs.

    Returns:
        Cost model calibrated by their measured time; uncalibrated if even small queries are slow.
    """
    if isinstance(denoiser, Compiling):
        denoiser.warm_up()
    costs = CostModel()
    candidates = [(denoiser.predict_seconds(query), query) for query in _small_queries(denoiser)]
    estimate, cheapest = min(candidates, key=_estimate)
    if estimate >= _WARM_UP_S:
        return costs
    denoiser.denoise(cheapest)
    short = [candidate for candidate in candidates if candidate[0] <= _TIMED_S]
    if short:
        _, timed = max(short, key=_estimate)
        costs.calibrate(*min(_time(denoiser, timed) for _ in range(2)))
    return costs


def step_estimates(denoiser: Denoiser) -> list[float]:
    """Return the denoiser's own estimates, in seconds, of the steps of a sample of one image.

    The levels are those of ``STEPS`` steps of DDIM. The image has no label, so that the whole bank
    is used, or the first supported label if the model requires one.
    """
    info = denoiser.info
    times = np.arange(STEPS, 0, -1) / STEPS
    level = info.levels(times)
    label = _first_label(denoiser)
    queries = (_query(denoiser, level[slice(i, i + 1)], label, window=0) for i in range(len(times)))
    return [denoiser.predict_seconds(query) for query in queries]


def duration(seconds: float) -> str:
    """Return a duration as text of two digits and a unit, or ``< 1 ms``.

    Below a millisecond, overheads that are not estimated dominate.
    """
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}"
    if seconds >= 0.1:
        return f"{seconds:.2g} s"
    return f"{1e3 * seconds:.2g} ms" if seconds >= 1e-3 else "< 1 ms"


def _time(denoiser: Denoiser, query: Query) -> tuple[float, float]:
    """Return estimate and measured seconds of a query; running it may change the estimate."""
    estimate = denoiser.predict_seconds(query)
    began = time.perf_counter()
    denoiser.denoise(query)
    return estimate, time.perf_counter() - began


def _estimate(candidate: tuple[float, Query]) -> float:
    return candidate[0]


def _first_label(denoiser: Denoiser) -> int:
    """Return -1 or, if unlabelled queries are rejected, the first supported label."""
    level = NoiseLevel(np.array([1.0]), np.array([1.0]))
    for label in range(-1, denoiser.info.label_count):
        with contextlib.suppress(InvalidArgumentError):
            denoiser.check(_query(denoiser, level, label, window=0))
            return label
    return -1


def _small_queries(denoiser: Denoiser) -> Iterator[Query]:
    """Yield queries of one image, with each label and with small and large windows."""
    info = denoiser.info
    level = NoiseLevel(np.array([1.0]), np.array([1.0]))
    for label in range(-1, info.label_count):
        for window in {0, min(1, info.max_window), info.max_window}:
            query = _query(denoiser, level, label, window)
            # A label may have no images.
            with contextlib.suppress(InvalidArgumentError):
                denoiser.check(query)
                yield query


def _query(denoiser: Denoiser, level: NoiseLevel, label: int, window: int) -> Query:
    """Return a query of one zero image, with a condition if the model requires one."""
    info = denoiser.info
    width = info.condition_width
    conditions = [Condition(np.zeros((1, width), np.float32))] if width else []
    return make_query(torch.zeros(1, *info.shape), level, label, window, conditions)
