"""Dispatch of queued queries to devices in batches, and delivery of their results.

    submit ─► admission ─► queue of the model ─► batch ─► device ─► rows to each request
                 │               │                │
                 │               │                └ deadline passed: dropped, not computed
                 │               └ evicted if its caller holds most and others need their share
                 └ rejected: budget full, or late by prediction

An idle device takes work at once; requests wait only while it is busy, and form batches meanwhile
(``batching``). Models share a device by time, as callers share a model. Everything but the
computation runs on the event loop, so there are no locks.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from els_kernels import ComputationStoppedError, Control
from els_service.config import Scheduling
from els_service.denoisers.base import Denoised, Query
from els_service.engine.admission import Admission, Workload, fail
from els_service.engine.batch_records import batch_record
from els_service.engine.batching import DELIVERY_S, INLINE_S, batch_s, next_batch, next_model
from els_service.engine.device import Device, DeviceLostError, Outcome
from els_service.engine.loaded_model import Chunk, LoadedModel, PendingRequest, answers
from els_service.engine.request_context import Observer, RequestContext, timed_out
from els_service.engine.reservations import NamedBudget
from els_service.errors import DeadlineExceededError, ElsError

_SLOW_S = 10 * INLINE_S
_WRONG = 3
"""Slow inline answers in a row after which the model is computed on its device."""

Results = Outcome[list[Denoised | Exception]]


@dataclass(slots=True, eq=False)
class _Running:
    """Batch under computation."""

    batch: list[Chunk]
    control: Control
    timer: asyncio.TimerHandle | None = None
    """Fires at the latest deadline of its members; None if a member has no deadline."""

    def stop_unless_wanted(self, now: float) -> None:
        """Stop the computation if every member is cancelled or past its deadline."""
        if all(i.pending.answer.done() or now >= i.pending.context.deadline for i in self.batch):
            self.control.stop()


class Scheduler:
    """Queues and devices of a process.

    Args:
        devices: devices, whose names are keys of the denoisers of loaded models.
        scheduling: bounds of queues and batches.
        memory: budget for the bytes of all waiting and computed requests.
        observer: receives a callback for each query and batch event.
        lost: called with the reason when a device is lost.
        clock: clock of deadlines, in seconds.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        scheduling: Scheduling,
        memory: NamedBudget,
        observer: Observer,
        lost: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._devices, self._limits, self._observer = devices, scheduling, observer
        self._lost, self.clock = lost, clock
        self._workload = Workload()
        self.admission = Admission(self._workload, scheduling, memory, observer, clock)
        self._running: Counter[PendingRequest] = Counter()
        """Request → number of its chunks under computation."""
        self._batches: dict[str, _Running] = {}
        """Device → batch under computation."""
        self._virtual = 0.0

    def submit(
        self, loaded: LoadedModel, query: Query, context: RequestContext, *, admitted: bool = False
    ) -> Denoised | asyncio.Future[Denoised]:
        """Return the answer to a checked query, or its future.

        Cancelling the future removes the query from the queue.

        Args:
            loaded: model whose denoiser answers.
            query: passed ``Denoiser.check``.
            context: deadline, priority and caller.
            admitted: whether it belongs to an admitted trajectory, and is exempt from admission.

        Raises:
            QueueFullError: A budget is full and the caller has its share of it.
            DeadlineExceededError: The answer would be late. The future may fail with either.
        """
        estimate = loaded.denoiser.predict_seconds(query)
        # By the estimate, not by measured times, which a busy machine increases, queues most.
        if estimate < INLINE_S and loaded.slow < _WRONG and not loaded.running and loaded.on_cpu:
            return self._inline(loaded, query, context, estimate)
        now = self.clock()
        pending = PendingRequest(loaded.model, query, context, now)
        if not admitted:
            self.admission.check_deadline(loaded, query, context, estimate, now)
            self.admission.reserve_for(loaded, pending, estimate)
        pending.answer.add_done_callback(partial(self._on_done, loaded, pending))
        most = batch_s(loaded, self._limits) / max(loaded.costs.marginal(1.0), 1e-9)
        if not loaded.queue and loaded not in self._workload.waiting:
            loaded.virtual = max(loaded.virtual, self._virtual)
        for chunk in pending.split(estimate, most):
            loaded.queue.push(chunk, now)
        self._workload.waiting[loaded] = None
        self._dispatch()
        return pending.answer

    def waiting(self) -> int:
        """Return the number of waiting chunks."""
        return sum(len(loaded.queue) for loaded in self._workload.waiting)

    def interrupt(self, error: ElsError) -> None:
        """Fail all requests that wait or are being computed."""
        pending_requests = [
            chunk.pending for loaded in self._workload.waiting for chunk in loaded.queue
        ]
        for pending in [*pending_requests, *self._running]:
            if not pending.answer.done():
                self._observer.on_dropped(pending.model, "interrupted")
                pending.answer.set_exception(error)

    def _inline(
        self, loaded: LoadedModel, query: Query, context: RequestContext, estimate: float
    ) -> Denoised:
        began = self.clock()
        if began > context.deadline:
            raise self.admission.too_late(
                loaded,
                f"the deadline passed before the query to {loaded.model} was computed",
            )
        succeeded = False
        try:
            answer = loaded.denoiser.denoise(query)
            succeeded = True
        finally:
            seconds = self.clock() - began
            loaded.slow = loaded.slow + 1 if seconds > _SLOW_S else 0
            self._observer.on_computed(loaded.model, seconds, len(query), estimate)
            loaded.statistics.at_once(len(query), seconds, time.time(), succeeded=succeeded)
            if not succeeded:
                self._observer.on_dropped(loaded.model, "faulted")
        if context.trace is not None:
            traced, span = [(context.trace, began)], (began, began + seconds)
            self._observer.on_batch(
                batch_record(loaded.model, "cpu", traced, len(query), estimate, span, self.clock)
            )
        return answer

    def _dispatch(self) -> None:
        """Start the next batch of every idle device."""
        for device in self._devices:
            while device.name not in self._workload.busy:
                now = self.clock()
                loaded = next_model(self._workload.waiting, device.name, now)
                if loaded is None:
                    break
                batch = next_batch(loaded, now, self._limits, self.admission.expire)
                if not loaded.queue:
                    self._workload.waiting.pop(loaded, None)
                if batch:
                    self._launch(device, loaded, batch, now)

    def _launch(self, device: Device, loaded: LoadedModel, batch: list[Chunk], now: float) -> None:
        estimate = sum(chunk.cost for chunk in batch)
        cost = loaded.costs.seconds(estimate)
        self._workload.busy[device.name] = now + cost
        self._virtual = loaded.virtual
        loaded.virtual += cost
        loaded.running += 1
        for chunk in batch:
            waited = now - chunk.pending.since
            self._observer.on_queued(loaded.model, waited)
            loaded.statistics.queued.add(waited)
            self._running[chunk.pending] += 1
        work = partial(answers, loaded.denoisers[device.name], [chunk.query for chunk in batch])
        running = self._batches[device.name] = self._watched(batch, now)
        done = device.run(work, self._limits.watchdog_s, predicted_s=cost, control=running.control)
        done.add_done_callback(partial(self._finish, device, loaded, batch, estimate, cost))

    def _watched(self, batch: list[Chunk], now: float) -> _Running:
        """Return a batch that is stopped at the latest deadline of its members."""
        running = _Running(batch, Control())
        latest = max(chunk.pending.context.deadline for chunk in batch)
        if latest < float("inf"):

            def expired() -> None:
                running.stop_unless_wanted(self.clock())

            # Slightly later, because the loop's clock and ``self.clock`` are read at two times.
            delay = max(0.0, latest - now) + DELIVERY_S
            running.timer = asyncio.get_running_loop().call_later(delay, expired)
        return running

    def _finish(
        self,
        device: Device,
        loaded: LoadedModel,
        batch: list[Chunk],
        estimate: float,
        cost: float,
        done: asyncio.Future[Results],
    ) -> None:
        """Start the next batch, then deliver the results of this one."""
        ended = self._workload.busy.pop(device.name)
        running = self._batches.pop(device.name)
        if running.timer is not None:
            running.timer.cancel()
        loaded.running -= 1
        error = done.exception()
        if isinstance(error, DeviceLostError):
            # Busy for ever, so that no batch is sent to it.
            self._workload.busy[device.name] = float("inf")
        elif isinstance(error, ComputationStoppedError):
            # Stopped without a result, but known to take longer than this.
            if (seconds := self.clock() - (ended - cost)) > cost:
                loaded.costs.learn(estimate, seconds, self.clock())
        elif error is None:
            outcome = done.result()
            if not any(isinstance(result, Exception) for result in outcome.value):
                loaded.costs.learn(estimate, outcome.ended - outcome.began, self.clock())
                loaded.slow = 0 if outcome.ended - outcome.began < _SLOW_S else loaded.slow
        self._dispatch()
        if error is None:
            self._computed(device, loaded, batch, cost, outcome)
            results: Sequence[Denoised | Exception] = outcome.value
        else:
            assert isinstance(error, Exception)
            results = [error] * len(batch)
        for chunk, result in zip(batch, results, strict=True):
            self._complete(loaded, chunk, result)
        if isinstance(error, DeviceLostError):
            self._lost(str(error))

    def _complete(self, loaded: LoadedModel, chunk: Chunk, result: Denoised | Exception) -> None:
        pending = chunk.pending
        self._running[pending] -= 1
        if not self._running[pending]:
            del self._running[pending]
            if pending.answer.done():
                pending.release()
        now = self.clock()
        if pending.answer.done():
            if pending.answer.cancelled():
                self._observer.on_dropped(loaded.model, "discarded")
        elif now > pending.context.deadline:
            self._observer.on_dropped(loaded.model, "discarded")
            loaded.statistics.failed.add(now - pending.since)
            late = now - pending.context.deadline
            fail(pending, DeadlineExceededError(f"{loaded.model} took {late:.3g} s too long"))
        elif isinstance(result, Exception):
            self._observer.on_dropped(loaded.model, "faulted")
            loaded.statistics.failed.add(now - pending.since)
            fail(pending, result)
        elif pending.complete(chunk.index, result):
            loaded.statistics.succeeded.add(now - pending.since)

    def _computed(
        self, device: Device, loaded: LoadedModel, batch: list[Chunk], cost: float, outcome: Results
    ) -> None:
        """Report a computed batch to observer and statistics."""
        seconds = outcome.ended - outcome.began
        images = sum(len(chunk.query) for chunk in batch)
        self._observer.on_computed(loaded.model, seconds, images, cost)
        loaded.statistics.batch(images, seconds, time.time())
        for _ in batch:
            loaded.statistics.computed.add(seconds)
        if any(chunk.pending.context.trace is not None for chunk in batch):
            traced = [(chunk.pending.context.trace, chunk.pending.since) for chunk in batch]
            span = outcome.began, outcome.ended
            record = batch_record(loaded.model, device.name, traced, images, cost, span, self.clock)
            self._observer.on_batch(record)

    def _on_done(
        self, loaded: LoadedModel, pending: PendingRequest, answer: asyncio.Future[Denoised]
    ) -> None:
        """Remove the waiting chunks of a request; stop batches that no other member needs."""
        withdrawn = loaded.withdraw(pending)
        if pending not in self._running:
            pending.release()
        else:
            for running in self._batches.values():
                running.stop_unless_wanted(self.clock())
        pending.chunks = []  # breaks a cycle that would hold pixels until garbage collection
        if withdrawn and answer.cancelled():
            now = self.clock()
            late = timed_out(pending.context.deadline - now)
            self._observer.on_dropped(loaded.model, "expired" if late else "cancelled")
        if not loaded.queue:
            self._workload.waiting.pop(loaded, None)
