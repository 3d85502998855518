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
from els_service.engine.request_context import allows
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
        self._check_times(loaded, query, self.evaluations, "evaluates", deadline - now, now)
        if self.explain_steps:
            times = len(self.explain_steps) * len(query)
            explainer = loaded.derived["explain"]
            self._check_times(explainer, query[:1], times, "explains", deadline - now, now)

    @staticmethod
    def _check_times(
        loaded: LoadedModel, query: Query, times: int, verb: str, slack: float, now: float
    ) -> None:
        """Check that so many computations of a query can end within ``slack`` seconds."""
        estimate = loaded.denoiser.predict_seconds(query)
        each = loaded.costs.seconds(estimate)
        if times * each <= slack:
            return
        if loaded.costs.may_reject(times * estimate, slack, now):
            raise DeadlineExceededError(
                f"the trajectory {verb} {loaded.model} {times} times, "
                f"{each:.3g} s each by prediction: {times * each:.3g} s; {allows(slack)}"
            )
