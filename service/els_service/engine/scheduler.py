"""Dispatch of queued queries to devices in batches, and delivery of their results.

    submit ─► admitted? ─► the model's queue ─► batch ─► device ─► each its rows
                 │               │                │
                 │               │                └ late by now: dropped before it is computed
                 │               └ its caller holds most of the room, and others need it: evicted
                 └ no room for its caller, or late by prediction

An idle device takes work at once; what comes while it is busy gathers meanwhile, which is all the
waiting there is. A batch ends where more would save little (its launch is a small part of it), or
where it would make a member late.
Models share a device by time, as callers share a model. Everything but the computation happens on
the event loop, so there are no locks.
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
from els_service.engine.batching import HAND_OUT_S, INLINE_S, batch_s, next_batch, next_model
from els_service.engine.device import Device, DeviceLostError, Outcome
from els_service.engine.loaded_model import Chunk, LoadedModel, PendingRequest, answers
from els_service.engine.request_context import Observer, RequestContext, timed_out
from els_service.engine.reservations import NamedBudget
from els_service.errors import DeadlineExceededError, ElsError

_SLOW_S = 10 * INLINE_S
_WRONG = 3
"""So many answers in a row that were slow, and they are no work for the event loop."""

Results = Outcome[list[Denoised | Exception]]


@dataclass(slots=True, eq=False)
class _Running:
    """A batch that is being computed."""

    batch: list[Chunk]
    control: Control
    timer: asyncio.TimerHandle | None = None
    """At the latest deadline of its members; None where one has none."""

    def stop_unless_wanted(self, now: float) -> None:
        """Stop the computation if every member was cancelled or its deadline has passed."""
        if all(i.pending.answer.done() or now >= i.pending.context.deadline for i in self.batch):
            self.control.stop()


class Scheduler:
    """All queues and all devices of a process.

    Args:
        devices: by which loaded models name their denoisers.
        scheduling: bounds of queues and batches.
        memory: room for the bytes of all that waits or is computed, of all models.
        observer: receives a callback for each query and batch event.
        lost: called when a device can compute no more.
        clock: in seconds; deadlines are on it.
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
        """Tickets with parts that are being computed, and how many."""
        self._batches: dict[str, _Running] = {}
        """Device → what it computes."""
        self._virtual = 0.0

    def submit(
        self, loaded: LoadedModel, query: Query, context: RequestContext, *, admitted: bool = False
    ) -> Denoised | asyncio.Future[Denoised]:
        """Return the answer to a checked query, or the answer to come.

        Cancelling the future takes the query out of the queue.

        Args:
            loaded: model whose denoiser answers.
            query: passed ``Denoiser.check``.
            context: deadline, priority and caller.
            admitted: whether it belongs to a trajectory, which has entered: then it always queues.

        Raises:
            QueueFullError: More work waits than is allowed, and the caller has its share of it.
            DeadlineExceededError: The answer would come too late. The future may fail with either.
        """
        estimate = loaded.denoiser.predict_seconds(query)
        # By the estimate, not by the clock: on a busy machine all takes longer, queues above all.
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
        """Return how many items wait."""
        return sum(len(loaded.queue) for loaded in self._workload.waiting)

    def interrupt(self, error: ElsError) -> None:
        """Fail everything that waits or is being computed."""
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
                f"the deadline of a question to {loaded.model} passed before it was computed",
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
        """Give every idle device its next batch."""
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
        """Return a batch that is stopped once its last member's deadline has passed."""
        running = _Running(batch, Control())
        latest = max(chunk.pending.context.deadline for chunk in batch)
        if latest < float("inf"):

            def expired() -> None:
                running.stop_unless_wanted(self.clock())

            # A little later, as the loop's clock and ours are not read at the same time.
            delay = max(0.0, latest - now) + HAND_OUT_S
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
        """Start the next batch, then hand out the results of this one."""
        ended = self._workload.busy.pop(device.name)
        running = self._batches.pop(device.name)
        if running.timer is not None:
            running.timer.cancel()
        loaded.running -= 1
        error = done.exception()
        if isinstance(error, DeviceLostError):
            # It stays busy for ever: nothing else is sent there.
            self._workload.busy[device.name] = float("inf")
        elif isinstance(error, ComputationStoppedError):
            # Without an answer, but not without a lesson: it takes longer than this.
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
        """Tell of a batch that was computed."""
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
        """Remove what waits of a request from the queue, and stop what is computed of it."""
        withdrawn = loaded.withdraw(pending)
        if pending not in self._running:
            pending.release()
        else:
            for running in self._batches.values():
                running.stop_unless_wanted(self.clock())
        pending.chunks = []  # they refer back: pixels would stay until garbage is collected
        if withdrawn and answer.cancelled():
            now = self.clock()
            late = timed_out(pending.context.deadline - now)
            self._observer.on_dropped(loaded.model, "expired" if late else "cancelled")
        if not loaded.queue:
            self._workload.waiting.pop(loaded, None)
