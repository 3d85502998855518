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
from els_service.engine.device import Device, WorkerDevice
from els_service.engine.loaded_model import LoadedModel
from els_service.engine.registry import ModelRegistry, ModelVersion
from els_service.engine.request_context import Observer, RequestContext, allows
from els_service.engine.reservations import NamedBudget, TrajectoryReservation
from els_service.engine.scheduler import Scheduler
from els_service.errors import DeadlineExceededError, UnavailableError

_SMALL = 8192
"""Numbers of state up to which a sampler's own arithmetic stays on the event loop."""
_HELD = 24
"""Bytes that a trajectory holds of each number: state and answer in float64, a message of both."""
_NO_TERMS = RequestContext()


@dataclass(frozen=True, eq=False)
class SamplingRun:
    """A trajectory to drive.

    Args:
        trajectory: from a sampler, not yet begun.
        labels: [count], -1 for none.
        windows: [count], 0 for the model's own at each level.
        questions: how many it will ask.
        conditions: one for each image, or none.
        decode: whether the last step brings the images of its latents, too.
        guidance: by label, [count]; None for none.
        held_bytes: that the trajectory holds beside state, answer and message: a start, an older D.
    """

    trajectory: Trajectory
    labels: Integers
    windows: Integers
    questions: int
    conditions: tuple[Condition, ...] = ()
    decode: bool = False
    guidance: npt.NDArray[np.float64] | None = None
    held_bytes: int = 0


class Engine:
    """Models by name, their queues, and the devices that compute for all of them.

    Use from one event loop. ``close`` waits for the computation under way.

    Attributes:
        models: those that are served.
        memory: bytes of messages, queries and trajectories in flight, of all models and callers.

    Args:
        observer: told of everything that happens to queries.
        scheduling: bounds of queues, batches and memory.
        devices: where models are loaded and computed; None for the CPU.
        clock: on which deadlines are, in seconds.
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
        """Caller → bytes of its trajectories that have not ended, even if they gave way."""
        self._ended = ""
        """Why nothing is answered any more; empty while something is."""
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Done with the reason once a device can compute no more: the process has to end."""

    def denoise(
        self,
        entry: ModelVersion,
        query: Query,
        context: RequestContext = _NO_TERMS,
        *,
        checked: bool = False,
    ) -> Denoised | asyncio.Future[Denoised]:
        """Return the answer to a query, or the answer to come where it has to wait.

        Args:
            entry: of ``models``.
            query: noisy images.
            context: deadline, priority, caller.
            checked: whether the query is known to fit; else that is checked here.

        Raises:
            InvalidArgumentError: The query does not fit the model.
            QueueFullError: More work waits than is allowed.
            DeadlineExceededError: The answer would come too late; the future may fail so, too.
            UnavailableError: The engine has to end; likewise.
        """
        loaded = self.models.mark_used(entry)
        if loaded is None:
            return asyncio.ensure_future(self._revived(entry, query, context))
        return self._submit(loaded, query, context, checked=checked)

    async def sample(
        self, name: str, run: SamplingRun, context: RequestContext = _NO_TERMS, *, version: str = ""
    ) -> AsyncGenerator[Step, None]:
        """Yield the steps of a trajectory; each of its questions is an item like any other.

        Between two steps nothing of it is queued: a reader who takes its time holds nobody up. It
        holds room for the whole of its life, and may have to give way at any step. It is answered
        by the version that answered its first question, whatever is loaded meanwhile.

        Raises:
            NotFoundError, InvalidArgumentError, QueueFullError, DeadlineExceededError,
            UnavailableError: As ``denoise``.
        """
        entry = self.models.entry(name, version)
        numbers = math.prod(entry.info.shape) * len(run.labels)
        size = _HELD * numbers + run.held_bytes
        size += sum(condition.nbytes for condition in run.conditions)
        self._trajectories += 1
        try:
            with (
                self._unended_of(entry, size, context),
                self._staying(entry, size, context) as stay,
            ):
                steps_of_it = self._steps(entry, run, context, stay, numbers > _SMALL)
                async with aclosing(steps_of_it) as steps:
                    async for step in steps:
                        yield step
        finally:
            self._trajectories -= 1

    async def _steps(
        self,
        entry: ModelVersion,
        run: SamplingRun,
        context: RequestContext,
        stay: TrajectoryReservation,
        large: bool,
    ) -> AsyncGenerator[Step, None]:
        loaded = await self._loaded(entry, context, stay)
        answer: Tensor | None = None
        begun = False
        while event := await self._advance(run.trajectory, answer, large):
            if isinstance(event, Step):
                answer = None
                if run.decode and event.index == event.total:
                    decoded = await self._decoded(loaded, event.x, context, stay)
                    event = replace(event, decoded=decoded)
                yield event
                continue
            query = _question(loaded.denoiser, event, run)
            if not begun:
                self._check_ended()
                loaded.denoiser.check(query)
                self._check_time(loaded, query, run, context)
                self._scheduler.admission.enter(
                    loaded, query, context, stay.reservation, decodes=run.decode
                )
                begun = True
            answer = (await self._step(loaded, query, context, stay)).mean.double()

    async def _step(
        self,
        loaded: LoadedModel,
        query: Query,
        context: RequestContext,
        stay: TrajectoryReservation,
    ) -> Denoised:
        """Return the answer to a question of a trajectory."""
        stay.check()
        given = self._submit(loaded, query, context, admitted=True)
        return given if isinstance(given, Denoised) else await stay.until(given)

    @contextmanager
    def _staying(
        self, entry: ModelVersion, size: int, context: RequestContext
    ) -> Iterator[TrajectoryReservation]:
        """Hold memory meanwhile.

        Raises:
            QueueFullError: There is no room, or it had to give way.
        """

        def gave_way() -> None:
            self._observer.on_dropped(entry.model, "evicted")
            entry.statistics.failed.add(0.0)

        stay = TrajectoryReservation(context.name(), gave_way)
        parts = ((self._memory, float(size)),)
        self._scheduler.admission.reserve(entry.model, entry.statistics, stay.reservation, parts)
        try:
            yield stay
        finally:
            stay.reservation.release()

    @contextmanager
    def _unended_of(
        self, entry: ModelVersion, size: int, context: RequestContext
    ) -> Iterator[None]:
        """Bound what trajectories take that gave way but whose callers do not read to their end.

        They cannot be ended before. With them a caller may have as much as if it were alone, and
        all callers twice as much.

        Raises:
            QueueFullError: It would be more.
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
        """Fail everything that waits, is computed, or is asked from now on, as UNAVAILABLE."""
        self._ended = reason
        self._scheduler.interrupt(UnavailableError(reason))

    def gauges(self) -> Iterator[tuple[str, dict[str, str], float]]:
        """Yield what can be read at any time: name, labels, value."""
        for entry in self.models:
            # Asked by another thread: it may be unloaded meanwhile.
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
        """Wait for the computation under way and end the threads."""
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

    async def _revived(
        self, entry: ModelVersion, query: Query, context: RequestContext
    ) -> Denoised:
        # The caller may be gone by the time that the model is loaded.
        context = replace(context, caller=context.name())
        with self._staying(entry, query.nbytes, context) as stay:
            loaded = await self._loaded(entry, context, stay)
        answer = self._submit(loaded, query, context)
        return answer if isinstance(answer, Denoised) else await answer

    async def _loaded(
        self, entry: ModelVersion, context: RequestContext, stay: TrajectoryReservation
    ) -> LoadedModel:
        """Return an entry's loaded model, loaded again if need be."""
        loaded = self.models.mark_used(entry)
        if loaded is not None:
            return loaded
        timeout_s = None if math.isinf(context.deadline) else context.deadline - self._clock()
        loading = asyncio.ensure_future(self.models.reload(entry))
        ended = stay.ending()
        try:
            await asyncio.wait((loading, ended), timeout=timeout_s, return_when="FIRST_COMPLETED")
            if loading.done():
                return loading.result()
            stay.check()
            text = f"{entry.model} was unloaded to save memory and is still being loaded"
            raise DeadlineExceededError(text)
        finally:
            loading.cancel()
            if not ended.cancel():
                ended.exception()  # taken note of: it would else be logged

    async def _decoded(
        self,
        loaded: LoadedModel,
        latents: Tensor,
        context: RequestContext,
        stay: TrajectoryReservation,
    ) -> Tensor:
        """Return the images of latents [B, C, H, W]."""
        assert loaded.decoder is not None  # as the model's info says
        level = NoiseLevel(np.ones(1), np.ones(1))  # means nothing here
        query = make_query(latents.float(), level)
        return (await self._step(loaded.decoder, query, context, stay)).mean

    def _check_time(
        self, loaded: LoadedModel, query: Query, run: SamplingRun, context: RequestContext
    ) -> None:
        """Raise if a trajectory would be late even if nobody else was there."""
        slack = context.deadline - self._clock()
        estimate = loaded.denoiser.predict_seconds(query)
        each = loaded.costs.seconds(estimate)
        if run.questions * each <= slack:
            return
        if loaded.costs.may_refuse(run.questions * estimate, slack, self._clock()):
            raise DeadlineExceededError(
                f"the trajectory asks {loaded.model} {run.questions} times, {each:.3g} s each "
                f"by prediction: {run.questions * each:.3g} s; {allows(slack)}"
            )

    async def _advance(
        self, trajectory: Trajectory, answer: Tensor | None, large: bool
    ) -> DenoiseCall | Step | None:
        if not large:
            return _send(trajectory, answer)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._helpers, _send, trajectory, answer)

    def _lose(self, reason: str) -> None:
        if not self.lost.done():
            self.lost.set_result(reason)
        self.interrupt(f"{reason}; ask another server")


def _question(denoiser: Denoiser, ask: DenoiseCall, run: SamplingRun) -> Query:
    chosen = windows_for(denoiser, ask)
    own = np.where(run.windows > 0, run.windows, chosen[0]) if chosen else run.windows
    level = NoiseLevel(ask.level.a, ask.level.s)
    query = make_query(ask.x.float(), level, run.labels.tolist(), own.tolist(), run.conditions)
    query.guidance = run.guidance
    if ask.unclipped:
        query.unclipped = np.ones(len(query), np.bool_)
    return query


def _send(trajectory: Trajectory, answer: Tensor | None) -> DenoiseCall | Step | None:
    try:
        return trajectory.send(answer)
    except StopIteration:
        return None
