"""Trajectories of samplers as the engine runs them: what to run, and its queries."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from els_service.denoisers.base import Condition, Denoised, Denoiser, Integers, Query, make_query
from els_service.denoisers.levels import NoiseLevel
from els_service.denoisers.samplers import DenoiseCall, Step, Trajectory, windows_for
from els_service.engine.loaded_model import LoadedModel
from els_service.errors import DeadlineExceededError


@dataclass(frozen=True, eq=False)
class SamplingRun:
    """Trajectory to run.

    Args:
        trajectory: new or resumed trajectory of a sampler.
        labels: [count], -1 for none.
        windows: [count], 0 for the model's own at each level.
        evaluations: number of its denoise calls.
        conditions: one for each image, or none.
        decode: whether the last step has the decoded images of its latents.
        guidance: by label, [count]; None for none.
        explain_steps: indices of the steps whose first call is explained; the model has sources.
        held_bytes: memory of the trajectory beside state, answer and message: a start, an older D.
        shape: (C, H, W) of its images; None for that of the model.
        window_scale: of the windows of the model's table.
        expected: queries that take as long as those of the trajectory, from its first step if it
            were not resumed, each with the number of calls in a row that it stands for; empty if
            all calls take as long as the first. Their pixels are not read.
    """

    trajectory: Trajectory
    labels: Integers
    windows: Integers
    evaluations: int
    conditions: tuple[Condition, ...] = ()
    decode: bool = False
    guidance: npt.NDArray[np.float64] | None = None
    explain_steps: frozenset[int] = field(default=frozenset(), kw_only=True)
    held_bytes: int = 0
    shape: tuple[int, int, int] | None = None
    window_scale: float = field(default=1.0, kw_only=True)
    expected: tuple[tuple[Query, int], ...] = field(default=(), kw_only=True)

    def query(self, denoiser: Denoiser, call: DenoiseCall) -> Query:
        """Return the query of a denoise call."""
        requested = windows_for(denoiser, call, self.window_scale)
        windows = self.windows
        if requested:
            windows = np.where(windows > 0, windows, requested[0])
        level = NoiseLevel(call.level.a, call.level.s)
        labels = self.labels.tolist() if call.label is None else call.label
        query = make_query(call.x.float(), level, labels, windows.tolist(), self.conditions)
        query.guidance = self.guidance
        if call.unclipped:
            query.unclipped = np.ones(len(query), np.bool_)
        return query

    def advance(self, answer: Denoised | None) -> DenoiseCall | Step | None:
        """Return the next call or step of the sampler; None at the end.

        Args:
            answer: answer to the previous denoise call; None after a step and at first.
        """
        # Samplers compute in torch, in float64.
        x_hat = None if answer is None else torch.from_numpy(answer.pixels).double()
        try:
            return self.trajectory.send(x_hat)
        except StopIteration:
            return None

    def check_time(self, loaded: LoadedModel, query: Query, deadline: float, now: float) -> None:
        """Check that the trajectory can end in time on an idle server.

        Args:
            loaded: model of the trajectory.
            query: its first query.
            deadline: on the engine's clock.
            now: on the engine's clock.

        Raises:
            DeadlineExceededError: It would be late by prediction.
        """
        left = self._left(query)
        _check_times(loaded, left, "evaluates", deadline - now, now)
        if self.explain_steps:
            explained = self._explained(query)
            _check_times(loaded.derived["explain"], explained, "explains", deadline - now, now)

    def longest(self, denoiser: Denoiser, query: Query) -> Query:
        """Return the query that takes longest of those that are left.

        Args:
            denoiser: of the trajectory.
            query: its first query.
        """
        return max((each for each, _ in self._left(query)), key=denoiser.predict_seconds)

    def _left(self, query: Query) -> list[tuple[Query, int]]:
        """Return the queries of the calls that are left, with their numbers."""
        if not self.expected:
            return [(query, self.evaluations)]
        left, found = self.evaluations, []
        for each, times in reversed(self.expected):
            if left > 0:
                found.append((each, min(left, times)))
                left -= times
        return found[::-1]

    def _explained(self, query: Query) -> list[tuple[Query, int]]:
        """Return one image of the queries of the explained steps, with their numbers."""
        if not self.expected:
            return [(query[:1], len(self.explain_steps) * len(query))]
        found, first = [], 1
        for each, times in self.expected:
            steps = sum(first <= step < first + times for step in self.explain_steps)
            if steps:
                found.append((each[:1], steps * len(each)))
            first += times
        return found


def _check_times(
    loaded: LoadedModel, queries: list[tuple[Query, int]], verb: str, slack: float, now: float
) -> None:
    """Check that computations of queries, so many of each, can end within ``slack`` seconds."""
    estimates = [(loaded.denoiser.predict_seconds(query), times) for query, times in queries]
    total = sum(times * loaded.costs.seconds(estimate) for estimate, times in estimates)
    if total <= slack:
        return
    if loaded.costs.may_reject(sum(times * one for one, times in estimates), slack, now):
        times = sum(times for _, times in estimates)
        raise DeadlineExceededError(
            f"the trajectory {verb} {loaded.model} {times} times, "
            f"{total / times:.3g} s each by prediction: {total:.3g} s",
            left_s=slack,
        )
