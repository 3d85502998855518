"""Engine: answers queries and advances trajectories of named models."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from els_service.config import Scheduling
from els_service.denoisers.base import (
    Condition,
    Denoised,
    Denoiser,
    Integers,
    Query,
    make_query,
)
from els_service.denoisers.levels import NoiseLevel
from els_service.denoisers.samplers import DenoiseCall, Step, Trajectory, windows_for
from els_service.engine.budget import Budget
from els_service.engine.derived import Computation
from els_service.engine.device import Device, WorkerDevice
from els_service.engine.loaded_model import LoadedModel
from els_service.engine.registry import ModelRegistry, ModelVersion
from els_service.engine.request_context import Observer, RequestContext, allows
from els_service.engine.reservations import NamedBudget, TrajectoryReservation
from els_service.engine.scheduler import Scheduler
from els_service.errors import DeadlineExceededError, UnavailableError

_SMALL = 8192
"""Maximum numbers of state for running a sampler on the event loop, else in a helper thread."""
_HELD = 24
"""Bytes that a trajectory holds per number: state and answer in float64, a message of both."""
_DEFAULT_CONTEXT = RequestContext()


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
        held_bytes: memory of the trajectory beside state, answer and message: a start, an older D.
        shape: (C, H, W) of its images; None for that of the model.
    """

    trajectory: Trajectory
    labels: Integers
    windows: Integers
    evaluations: int
    conditions: tuple[Condition, ...] = ()
    decode: bool = False
    guidance: npt.NDArray[np.float64] | None = None
    held_bytes: int = 0
    shape: tuple[int, int, int] | None = None


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
        self._memory = NamedBudget(self.memory, "the memory for requests in flight", seconds=False)
        self._scheduler = Scheduler(
            self._devices, scheduling, self._memory, observer, self._lose, clock
        )
        self._observer, self._clock = observer, clock
        self._helpers = ThreadPoolExecutor(2, "els-helper")
        self._trajectories = 0
        self._unended: Counter[str] = Counter()
        """Caller → bytes of its trajectories that have not ended, evicted ones included."""
        self._ended = ""
        """Reason why all queries are rejected; empty while they are accepted."""
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Resolves with the reason when a device is lost; then the process must exit."""

    def denoise(
        self,
        entry: ModelVersion,
        query: Query,
        context: RequestContext = _DEFAULT_CONTEXT,
        *,
        checked: bool = False,
    ) -> Denoised | asyncio.Future[Denoised]:
        """Return the answer to a query, or its future if the query has to wait.

        Args:
            entry: version of a model in ``models``.
            query: noisy images.
            context: deadline, priority, caller.
            checked: whether the query passed ``Denoiser.check``; otherwise it is checked here.

        Raises:
            InvalidArgumentError: The query does not fit the model.
            QueueFullError: A budget is full.
            DeadlineExceededError: The answer would be late. The future may fail with it, too.
            UnavailableError: The engine was interrupted. The future may fail with it, too.
        """
        loaded = self.models.mark_used(entry)
        if loaded is None:
            return asyncio.ensure_future(self._reload_and_denoise(entry, query, context))
        # As ``_submit``, without its frame: every small call comes by.
        if self._ended:
            raise UnavailableError(self._ended)
        if not checked:
            loaded.denoiser.check(query)
        return self._scheduler.submit(loaded, query, context)

    async def loaded_entry(
        self, name: str, version: str = "", context: RequestContext = _DEFAULT_CONTEXT
    ) -> ModelVersion:
        """Return a version in ``models`` that is loaded now; reloads an unloaded one.

        Its files may have changed since it was unloaded, and with them its description.

        Raises:
            NotFoundError, QueueFullError, DeadlineExceededError, UnavailableError: As ``sample``.
            LoadError: It can no longer be loaded.
        """
        while (entry := self.models.entry(name, version)).loaded is None:
            with self._reserved(entry, _HELD * math.prod(entry.info.shape), context) as reservation:
                await self._loaded(entry, context, reservation)
        return entry

    async def derive(
        self,
        entry: ModelVersion,
        computation: Computation,
        query: Query,
        context: RequestContext = _DEFAULT_CONTEXT,
    ) -> Denoised:
        """Return the answer of another computation than ``denoise``, queued as that is.

        Args:
            entry: version of a model in ``models`` that supports it.
            computation: a key of ``LoadedModel.derived``.
            query: as the computation packs it; see ``derived``.
            context: deadline, priority, caller.

        Raises:
            ElsError: As ``denoise``.
        """
        loaded = self.models.mark_used(entry)
        if loaded is None:
            return await self._reload_and_denoise(entry, query, context, computation)
        answer = self._submit(loaded.derived[computation], query, context)
        return answer if isinstance(answer, Denoised) else await answer

    async def derive_each(
        self,
        entry: ModelVersion,
        computation: Computation,
        query: Query,
        answer_bytes: int,
        context: RequestContext = _DEFAULT_CONTEXT,
    ) -> AsyncGenerator[Denoised, None]:
        """Yield the answer for each image of a query, which is queued when it is asked for.

        Between two images nothing is queued, so a slow reader delays no other request. The query
        reserves memory for its whole life, and may be evicted between two images.

        Args:
            entry: version of a model in ``models`` that supports the computation.
            computation: a key of ``LoadedModel.derived``.
            query: images.
            answer_bytes: size of the answer for one image.
            context: deadline of all images together, priority, caller.

        Raises:
            ElsError: As ``denoise``.
        """
        size = query.nbytes + answer_bytes
        with (
            self._unended_of(entry, size, context),
            self._reserved(entry, size, context) as reservation,
        ):
            for index in range(len(query)):
                loaded = await self._loaded(entry, context, reservation)
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
        entry = self.models.entry(name, version)
        numbers = math.prod(run.shape or entry.info.shape) * len(run.labels)
        size = _HELD * numbers + run.held_bytes
        size += sum(condition.nbytes for condition in run.conditions)
        self._trajectories += 1
        try:
            with (
                self._unended_of(entry, size, context),
                self._reserved(entry, size, context) as reservation,
            ):
                generator = self._steps(entry, run, context, reservation, numbers > _SMALL)
                async with aclosing(generator) as steps:
                    async for step in steps:
                        yield step
        finally:
            self._trajectories -= 1

    async def _steps(
        self,
        entry: ModelVersion,
        run: SamplingRun,
        context: RequestContext,
        reservation: TrajectoryReservation,
        large: bool,
    ) -> AsyncGenerator[Step, None]:
        loaded = await self._loaded(entry, context, reservation)
        answer: Denoised | None = None
        begun = False
        while event := await self._advance(run.trajectory, answer, large):
            if isinstance(event, Step):
                answer = None
                if run.decode and event.index == event.total:
                    decoded = await self._decoded(loaded, event.x, context, reservation)
                    event = replace(event, decoded=decoded)
                yield event
                continue
            query = _query_of(loaded.denoiser, event, run)
            if not begun:
                self._check_ended()
                loaded.denoiser.check(query)
                self._check_time(loaded, query, run, context)
                self._scheduler.admission.enter(
                    loaded, query, context, reservation.held, decodes=run.decode
                )
                begun = True
            answer = await self._step(loaded, query, context, reservation)

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

    @contextmanager
    def _reserved(
        self, entry: ModelVersion, size: int, context: RequestContext
    ) -> Iterator[TrajectoryReservation]:
        """Reserve memory within the context.

        Raises:
            QueueFullError: The memory is full.
        """

        def on_evicted() -> None:
            self._observer.on_dropped(entry.model, "evicted")
            entry.statistics.failed.add(0.0)

        reservation = TrajectoryReservation(context.name(), on_evicted)
        parts = ((self._memory, float(size)),)
        self._scheduler.admission.reserve(entry.model, entry.statistics, reservation.held, parts)
        try:
            yield reservation
        finally:
            reservation.held.release()

    @contextmanager
    def _unended_of(
        self, entry: ModelVersion, size: int, context: RequestContext
    ) -> Iterator[None]:
        """Bound the memory of evicted trajectories whose callers have not read the error yet.

        Their generators still hold state. Including them, a caller may hold the whole capacity,
        and all callers together twice as much.

        Raises:
            QueueFullError: The bound would be exceeded.
        """
        unended, caller, most = self._unended, context.name(), self.memory.capacity
        own, everybody = unended[caller], unended.total()
        if (own and own + size > most) or (everybody and everybody + size > 2 * most):
            self._observer.on_dropped(entry.model, "rejected_full")
            raise self._memory.full(caller, size)
        unended[caller] += size
        try:
            yield
        finally:
            unended[caller] -= size
            if not unended[caller]:
                del unended[caller]

    def interrupt(self, reason: str) -> None:
        """Fail all waiting, running and later queries as UNAVAILABLE."""
        self._ended = reason
        self._scheduler.interrupt(UnavailableError(reason))

    def gauges(self) -> Iterator[tuple[str, dict[str, str], float]]:
        """Yield the current value of each gauge: name, labels, value."""
        for entry in self.models:
            # Read once, because this runs in another thread and the model may be unloaded.
            loaded = entry.loaded
            if loaded is not None:
                labels = {"model": entry.model}
                for each in loaded.queues:
                    yield "els_queue_items", labels, len(each.queue)
                    yield "els_queue_cost_seconds", labels, each.waiting_s
                    yield "els_queue_reserved_seconds", labels, each.seconds.budget.used
        for model, size in self.models.memory().items():
            yield "els_model_memory_bytes", {"model": model}, size
        for device in self._devices:
            yield "els_device_busy_seconds_total", {"device": device.name}, device.busy_s
            yield "els_device_running_seconds", {"device": device.name}, device.running_s
            yield "els_device_stalled_seconds", {"device": device.name}, device.stalled_s
        for model, refused in self.models.refused().items():
            yield "els_model_refused", {"model": model}, refused
        yield "els_memory_in_flight_bytes", {}, self.memory.used
        yield "els_memory_in_flight_limit_bytes", {}, self.memory.capacity
        yield "els_trajectories", {}, self._trajectories

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
        entry: ModelVersion,
        query: Query,
        context: RequestContext,
        computation: Computation | None = None,
    ) -> Denoised:
        # Resolved now: the connection may be closed when the model is loaded.
        context = replace(context, caller=context.name())
        with self._reserved(entry, query.nbytes, context) as reservation:
            loaded = await self._loaded(entry, context, reservation)
        queue = loaded if computation is None else loaded.derived[computation]
        answer = self._submit(queue, query, context)
        return answer if isinstance(answer, Denoised) else await answer

    async def _loaded(
        self, entry: ModelVersion, context: RequestContext, reservation: TrajectoryReservation
    ) -> LoadedModel:
        """Return the loaded model of a version; reloads an unloaded one."""
        loaded = self.models.mark_used(entry)
        if loaded is not None:
            return loaded
        timeout_s = None if math.isinf(context.deadline) else context.deadline - self._clock()
        loading = asyncio.ensure_future(self.models.reload(entry))
        evicted = reservation.ending()
        try:
            await asyncio.wait((loading, evicted), timeout=timeout_s, return_when="FIRST_COMPLETED")
            if loading.done():
                return loading.result()
            reservation.check()
            text = f"{entry.model} was unloaded to save memory and is still being loaded"
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

    def _check_time(
        self, loaded: LoadedModel, query: Query, run: SamplingRun, context: RequestContext
    ) -> None:
        """Raise if a trajectory would be late even on an idle server."""
        slack = context.deadline - self._clock()
        estimate = loaded.denoiser.predict_seconds(query)
        each = loaded.costs.seconds(estimate)
        if run.evaluations * each <= slack:
            return
        if loaded.costs.may_refuse(run.evaluations * estimate, slack, self._clock()):
            raise DeadlineExceededError(
                f"the trajectory evaluates {loaded.model} {run.evaluations} times, "
                f"{each:.3g} s each by prediction: {run.evaluations * each:.3g} s; {allows(slack)}"
            )

    async def _advance(
        self, trajectory: Trajectory, answer: Denoised | None, large: bool
    ) -> DenoiseCall | Step | None:
        if not large:
            return _send(trajectory, answer)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._helpers, _send, trajectory, answer)

    def _lose(self, reason: str) -> None:
        if not self.lost.done():
            self.lost.set_result(reason)
        self.interrupt(f"{reason}; use another server")


def _query_of(denoiser: Denoiser, call: DenoiseCall, run: SamplingRun) -> Query:
    chosen = windows_for(denoiser, call)
    own = np.where(run.windows > 0, run.windows, chosen[0]) if chosen else run.windows
    level = NoiseLevel(call.level.a, call.level.s)
    query = make_query(call.x.float(), level, run.labels.tolist(), own.tolist(), run.conditions)
    query.guidance = run.guidance
    if call.unclipped:
        query.unclipped = np.ones(len(query), np.bool_)
    return query


def _send(trajectory: Trajectory, answer: Denoised | None) -> DenoiseCall | Step | None:
    # Samplers compute in torch, in float64.
    x_hat = None if answer is None else torch.from_numpy(answer.pixels).double()
    try:
        return trajectory.send(x_hat)
    except StopIteration:
        return None
