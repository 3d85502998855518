"""The engine: answers queries and drives trajectories for named models."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from els_service.denoisers.base import Denoised, Denoiser, Integers, Query, make_query
from els_service.denoisers.levels import NoiseLevel
from els_service.denoisers.samplers import Ask, Step, Trajectory, windows_for
from els_service.engine.batcher import Batcher
from els_service.engine.observer import Observer
from els_service.engine.repository import ModelRepository
from els_service.errors import (
    InvalidArgumentError,
    LoadError,
    NotFoundError,
    UnavailableError,
    shortened,
)

_log = logging.getLogger(__name__)

_WARM_UP_S = 2.0
"""A model whose cheapest question takes longer is served cold."""
_SMALL = 8192
"""Numbers of state up to which a sampler's own arithmetic stays on the event loop."""


class Engine:
    """Models by name; one worker thread computes for all of them.

    Use from one event loop. ``close`` waits for the computation under way.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._worker = ThreadPoolExecutor(1, "els-worker")
        self._helpers = ThreadPoolExecutor(2, "els-helper")
        self._batchers: dict[str, Batcher] = {}
        self.faults: dict[str, LoadError] = {}
        """Why models of the repository are not served."""
        self.loading = True

    @property
    def models(self) -> dict[str, Denoiser]:
        """The denoisers that answer, by name, sorted."""
        return {name: self._batchers[name].denoiser for name in sorted(self._batchers)}

    def __contains__(self, name: object) -> bool:
        return name in self._batchers

    async def load(self, repository: ModelRepository) -> None:
        """Load and warm every model of a repository; keeps why one is refused in ``faults``."""
        loop = asyncio.get_running_loop()
        for name in repository.names():
            try:
                denoiser = await loop.run_in_executor(self._worker, _load, repository, name)
            except LoadError as error:
                _log.error("model refused", extra={"model": name, "reason": str(error)})
                self.faults[name] = error
            except Exception as error:
                # Others serve even if one fails in a way that nobody foresaw.
                _log.exception("model refused", extra={"model": name})
                self.faults[name] = LoadError(name, f"failed at its first question: {error}")
            else:
                self.add(name, denoiser)
        self.loading = False

    def add(self, name: str, denoiser: Denoiser) -> None:
        """Serve a denoiser under a name."""
        self._batchers[name] = Batcher(name, denoiser, self._worker, self._observer)

    def denoiser(self, name: str) -> Denoiser:
        """Return a served denoiser.

        Raises:
            NotFoundError: There is none of that name; names those there are.
            UnavailableError: There is none yet.
        """
        return self._batcher(name).denoiser

    async def denoise(self, name: str, query: Query, deadline: float = math.inf) -> Denoised:
        """Return the answer to a query.

        Args:
            name: of the model.
            query: is checked here.
            deadline: on ``time.monotonic``'s clock.

        Raises:
            NotFoundError: No such model.
            InvalidArgumentError: The query does not fit the model.
            DeadlineExceededError: The deadline passed before the work was begun.
        """
        batcher = self._batcher(name)
        batcher.denoiser.check(query)
        return await batcher.submit(query, deadline)

    async def sample(
        self,
        name: str,
        trajectory: Trajectory,
        labels: Integers,
        windows: Integers,
        deadline: float = math.inf,
    ) -> AsyncIterator[Step]:
        """Yield the steps of a trajectory; each of its questions is an item like any other.

        Args:
            name: of the model.
            trajectory: from a sampler, not yet begun.
            labels: [count], -1 for none.
            windows: [count], 0 for the model's own at each level.
            deadline: on ``time.monotonic``'s clock.

        Raises:
            NotFoundError, InvalidArgumentError, DeadlineExceededError: As ``denoise``.
        """
        denoiser = self.denoiser(name)
        large = math.prod(denoiser.info.shape) * len(labels) > _SMALL
        answer: Tensor | None = None
        while True:
            event = await self._advance(trajectory, answer, large)
            match event:
                case None:
                    return
                case Step():
                    answer = None
                    yield event
                case Ask():
                    chosen = windows_for(denoiser, event)
                    own = np.where(windows > 0, windows, chosen[0]) if chosen else windows
                    level = NoiseLevel(event.level.a, event.level.s)
                    query = make_query(event.x.float(), level, labels.tolist(), own.tolist())
                    answer = (await self.denoise(name, query, deadline)).mean.double()

    async def _advance(
        self, trajectory: Trajectory, answer: Tensor | None, large: bool
    ) -> Ask | Step | None:
        if not large:
            return _send(trajectory, answer)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._helpers, _send, trajectory, answer)

    def _batcher(self, name: str) -> Batcher:
        try:
            return self._batchers[name]
        except KeyError:
            if self.loading:
                raise UnavailableError("models are still being loaded") from None
            if name in self.faults:
                raise NotFoundError(f"model: {name} was refused when it was loaded") from None
            known = shortened(", ".join(sorted(self._batchers)) or "none")
            raise NotFoundError(f"model: expected one of {known}, got {name!r:.100}") from None

    def close(self) -> None:
        """Wait for the computation under way and end the threads."""
        self._worker.shutdown()
        self._helpers.shutdown()


def _send(trajectory: Trajectory, answer: Tensor | None) -> Ask | Step | None:
    try:
        return trajectory.send(answer)
    except StopIteration:
        return None


def _load(repository: ModelRepository, name: str) -> Denoiser:
    """Load a model and ask it a small question, so that the first caller waits for nothing."""
    denoiser = repository.load(name)
    questions = list(_small_questions(denoiser))
    cheapest = min(questions, key=denoiser.predict_seconds)
    if denoiser.predict_seconds(cheapest) < _WARM_UP_S:
        denoiser.denoise(cheapest)
    return denoiser


def _small_questions(denoiser: Denoiser) -> Iterator[Query]:
    """Yield one image with each label and with small and large windows."""
    info = denoiser.info
    level = NoiseLevel(np.array([1.0]), np.array([1.0]))
    for label in range(-1, info.label_count):
        for window in {0, min(1, info.max_window), info.max_window}:
            query = make_query(torch.zeros(1, *info.shape), level, label, window)
            # A label may have no images.
            with contextlib.suppress(InvalidArgumentError):
                denoiser.check(query)
                yield query
