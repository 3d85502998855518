"""Engine: answers queries and advances trajectories of named models."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from els_service.config import Scheduling
from els_service.denoisers.base import (
    Denoised,
    Query,
    make_query,
)
from els_service.denoisers.explanations import Explanation
from els_service.denoisers.levels import NoiseLevel
from els_service.denoisers.samplers import DenoiseCall, Step
from els_service.engine.budget import Budget
from els_service.engine.derived import Computation
from els_service.engine.device import Device, WorkerDevice
from els_service.engine.gauges import gauges
from els_service.engine.loaded_model import LoadedModel
from els_service.engine.model_versions import ModelVersion
from els_service.engine.registry import ModelRegistry
from els_service.engine.request_context import Observer, RequestContext
from els_service.engine.request_memory import RequestMemory
from els_service.engine.reservations import NamedBudget, TrajectoryReservation
from els_service.engine.sampling import SamplingRun
from els_service.engine.scheduler import Scheduler
from els_service.errors import DeadlineExceededError, UnavailableError

_SMALL = 8192
"""Maximum numbers of state for running a sampler on the event loop, else in a helper thread."""
_HELD = 24
"""Bytes that a trajectory holds per number: state and answer in float64, a message of both."""
_DEFAULT_CONTEXT = RequestContext()


class Engine:
    """Models, their queues, and the devices that compute for all of them.

    Use from one event loop. ``close`` waits for the current computation.

    Attributes:
        models: registry of served models.
        memory: budget of messages, queries and trajectories in flight, in bytes.

    Args:
        observer: receives a callback for each query and batch event.
        scheduling: bounds of queues, batches and memory.
        devices: devices on which models are loaded; None for the CPU.
        clock: clock of deadlines, in seconds.
    """

    def __init__(
        self,
        observer: Observer,
        scheduling: Scheduling | None = None,
        devices: Sequence[Device] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        scheduling = scheduling or Scheduling()
        self._devices = [WorkerDevice("cpu")] if devices is None else list(devices)
        self.models = ModelRegistry(self._devices, scheduling, self._lose)
        self.memory = Budget(scheduling.in_flight_bytes)
        memory = NamedBudget(self.memory, "the memory for requests in flight", seconds=False)
        self._scheduler = Scheduler(self._devices, scheduling, memory, observer, self._lose, clock)
        self._clock = clock
        self._helpers = ThreadPoolExecutor(2, "els-helper")
        self._trajectories = 0
        self._requests = RequestMemory(memory, self._scheduler.admission, observer)
        self._ended = ""
        """Reason why all queries are rejected; empty while they are accepted."""
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Resolves with the reason when a device is lost; then the process must exit."""

    def denoise(
        self,
        served: ModelVersion,
        query: Query,
        context: RequestContext = _DEFAULT_CONTEXT,
        *,
        checked: bool = False,
    ) -> Denoised | asyncio.Future[Denoised]:
        """Return the answer to a query, or its future if the query has to wait.

        Args:
            served: version of a model in ``models``.
            query: noisy images.
            context: deadline, priority, caller.
            checked: whether the query passed ``Denoiser.check``; otherwise it is checked here.

        Raises:
            InvalidArgumentError: The query does not fit the model.
            QueueFullError: A budget is full.
            DeadlineExceededError: The answer would be late. The future may fail with it, too.
            UnavailableError: The engine was interrupted. The future may fail with it, too.
        """
        loaded = self.models.mark_used(served)
        if loaded is None:
            return asyncio.ensure_future(self._reload_and_denoise(served, query, context))
        # As ``_submit``, without its frame: every small call comes by.
        if self._ended:
            raise UnavailableError(self._ended)
        if not checked:
            loaded.denoiser.check(query)
        return self._scheduler.submit(loaded, query, context)

    async def find_loaded(
        self, name: str, version: str = "", context: RequestContext = _DEFAULT_CONTEXT
    ) -> ModelVersion:
        """Return a version in ``models`` that is loaded now; reloads an unloaded one.

        Its files may have changed since it was unloaded, and with them its description.

        Raises:
            NotFoundError, QueueFullError, DeadlineExceededError, UnavailableError: As ``sample``.
            LoadError: It can no longer be loaded.
        """
        while (served := self.models.find(name, version)).loaded is None:
            size = _HELD * math.prod(served.info.shape)
            with self._requests.reserved(served, size, context) as reservation:
                await self._loaded(served, context, reservation)
        return served

    async def derive(
        self,
        served: ModelVersion,
        computation: Computation,
        query: Query,
        context: RequestContext = _DEFAULT_CONTEXT,
    ) -> Denoised:
        """Return the answer of another computation than ``denoise``, queued as that is.

        Args:
            served: version of a model in ``models`` that supports it.
            computation: a key of ``LoadedModel.derived``.
            query: as the computation packs it; see ``derived``.
            context: deadline, priority, caller.

        Raises:
            ElsError: As ``denoise``.
        """
        loaded = self.models.mark_used(served)
        if loaded is None:
            return await self._reload_and_denoise(served, query, context, computation)
        answer = self._submit(loaded.derived[computation], query, context)
        return answer if isinstance(answer, Denoised) else await answer

    async def derive_each(
        self,
        served: ModelVersion,
        computation: Computation,
        query: Query,
        answer_bytes: int,
        context: RequestContext = _DEFAULT_CONTEXT,
    ) -> AsyncGenerator[Denoised, None]:
        """Yield the answer for each image of a query, which is queued when it is asked for.

        Between two images nothing is queued, so a slow reader delays no other request. The query
        reserves memory for its whole life, and may be evicted between two images.

        Args:
            served: version of a model in ``models`` that supports the computation.
            computation: a key of ``LoadedModel.derived``.
            query: images.
            answer_bytes: size of the answer for one image.
            context: deadline of all images together, priority, caller.

        Raises:
            ElsError: As ``denoise``.
        """
        size = query.nbytes + answer_bytes
        with self._requests.trajectory(served, size, context) as reservation:
            for index in range(len(query)):
                loaded = await self._loaded(served, context, reservation)
                reservation.check()
                one = query[index : index + 1]
                answer = self._submit(loaded.derived[computation], one, context)
                yield answer if isinstance(answer, Denoised) else await reservation.until(answer)

    async def sample(
        self,
        name: str,
        run: SamplingRun,
        context: RequestContext = _DEFAULT_CONTEXT,
        *,
        version: str = "",
    ) -> AsyncGenerator[Step, None]:
        """Yield the steps of a trajectory, each of whose denoise calls is queued like any query.

        Between two steps nothing of it is queued, so a slow reader delays no other request. It
        reserves memory for its whole life, and may be evicted at any step. All steps use the
        version that served the first, even if another is loaded meanwhile.

        Raises:
            NotFoundError, InvalidArgumentError, QueueFullError, DeadlineExceededError,
            UnavailableError: As ``denoise``.
        """
        served = self.models.find(name, version)
        numbers = math.prod(run.shape or served.info.shape) * len(run.labels)
        size = _HELD * numbers + run.held_bytes
        size += sum(condition.nbytes for condition in run.conditions)
        self._trajectories += 1
        try:
            with self._requests.trajectory(served, size, context) as reservation:
                generator = self._steps(served, run, context, reservation, numbers > _SMALL)
                async with aclosing(generator) as steps:
                    async for step in steps:
                        yield step
        finally:
            self._trajectories -= 1

    async def _steps(
        self,
        served: ModelVersion,
        run: SamplingRun,
        context: RequestContext,
        reservation: TrajectoryReservation,
        large: bool,
    ) -> AsyncGenerator[Step, None]:
        loaded = await self._loaded(served, context, reservation)
        answer: Denoised | None = None
        first: Query | None = None
        begun = False
        while event := await self._advance(run, answer, large):
            if isinstance(event, Step):
                answer = None
                if run.decode and event.index == event.total:
                    decoded = await self._decoded(loaded, event.x, context, reservation)
                    event = replace(event, decoded=decoded)
                if event.index in run.explain_steps and first is not None:
                    found = await self._explained(loaded, first, context, reservation)
                    # Queries of a tileable picture have a border in which it repeats.
                    height, width = event.denoised.shape[2:]
                    inside = tuple(each.central(height, width) for each in found)
                    event = replace(event, explanations=inside)
                first = None
                yield event
                continue
            query = run.query(loaded.denoiser, event)
            first = first or query
            if not begun:
                self._check_ended()
                loaded.denoiser.check(query)
                run.check_time(loaded, query, context.deadline, self._clock())
                longest = run.longest(loaded.denoiser, query)
                self._scheduler.admission.enter(
                    loaded, longest, context, reservation.held, decodes=run.decode
                )
                begun = True
            answer = await self._step(loaded, query, context, reservation)

    async def _explained(
        self,
        loaded: LoadedModel,
        query: Query,
        context: RequestContext,
        reservation: TrajectoryReservation,
    ) -> tuple[Explanation, ...]:
        """Return the explanation of each image of a query, queued one by one as in ``Explain``."""
        found = []
        for index in range(len(query)):
            one = query[index : index + 1]
            answer = await self._step(loaded.derived["explain"], one, context, reservation)
            assert isinstance(answer, Explanation)
            found.append(answer)
        return tuple(found)

    async def _step(
        self,
        loaded: LoadedModel,
        query: Query,
        context: RequestContext,
        reservation: TrajectoryReservation,
    ) -> Denoised:
        """Return the answer to a query of a trajectory."""
        reservation.check()
        answer = self._submit(loaded, query, context, admitted=True)
        return answer if isinstance(answer, Denoised) else await reservation.until(answer)

    def interrupt(self, reason: str) -> None:
        """Fail all waiting, running and later queries as UNAVAILABLE."""
        self._ended = reason
        self._scheduler.interrupt(UnavailableError(reason))

    def gauges(self) -> Iterator[tuple[str, dict[str, str], float]]:
        """Yield the current value of each gauge: name, labels, value."""
        return gauges(self.models, self._devices, self.memory, self._trajectories)

    def close(self) -> None:
        """Wait for the current computation and end the threads."""
        for device in self._devices:
            device.close()
        self._helpers.shutdown()
        self.models.close()

    def _submit(
        self,
        loaded: LoadedModel,
        query: Query,
        context: RequestContext,
        *,
        checked: bool = False,
        admitted: bool = False,
    ) -> Denoised | asyncio.Future[Denoised]:
        self._check_ended()
        if not checked:
            loaded.denoiser.check(query)
        return self._scheduler.submit(loaded, query, context, admitted=admitted)

    def _check_ended(self) -> None:
        if self._ended:
            raise UnavailableError(self._ended)

    async def _reload_and_denoise(
        self,
        served: ModelVersion,
        query: Query,
        context: RequestContext,
        computation: Computation | None = None,
    ) -> Denoised:
        # Resolved now: the connection may be closed when the model is loaded.
        context = replace(context, caller=context.name())
        with self._requests.reserved(served, query.nbytes, context) as reservation:
            loaded = await self._loaded(served, context, reservation)
        queue = loaded if computation is None else loaded.derived[computation]
        answer = self._submit(queue, query, context)
        return answer if isinstance(answer, Denoised) else await answer

    async def _loaded(
        self, served: ModelVersion, context: RequestContext, reservation: TrajectoryReservation
    ) -> LoadedModel:
        """Return the loaded model of a version; reloads an unloaded one."""
        loaded = self.models.mark_used(served)
        if loaded is not None:
            return loaded
        timeout_s = None if math.isinf(context.deadline) else context.deadline - self._clock()
        loading = asyncio.ensure_future(self.models.reload(served))
        evicted = reservation.ending()
        try:
            await asyncio.wait((loading, evicted), timeout=timeout_s, return_when="FIRST_COMPLETED")
            if loading.done():
                return loading.result()
            reservation.check()
            text = f"{served.model} was unloaded to save memory and is still being loaded"
            raise DeadlineExceededError(text)
        finally:
            loading.cancel()
            if not evicted.cancel():
                evicted.exception()  # retrieved, because asyncio logs other exceptions

    async def _decoded(
        self,
        loaded: LoadedModel,
        latents: Tensor,
        context: RequestContext,
        reservation: TrajectoryReservation,
    ) -> Tensor:
        """Return the images of latents [B, C, H, W]."""
        assert loaded.decoder is not None  # requests to decode are checked against the model's info
        level = NoiseLevel(np.ones(1), np.ones(1))  # unused
        query = make_query(latents.float(), level)
        return torch.from_numpy(
            (await self._step(loaded.decoder, query, context, reservation)).pixels
        )

    async def _advance(
        self, run: SamplingRun, answer: Denoised | None, large: bool
    ) -> DenoiseCall | Step | None:
        if not large:
            return run.advance(answer)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._helpers, run.advance, answer)

    def _lose(self, reason: str) -> None:
        if not self.lost.done():
            self.lost.set_result(reason)
        self.interrupt(f"{reason}; use another server")
