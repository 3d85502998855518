"""Turns the queries that wait for many models into launches on few devices, and keeps promises.

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
from els_service.engine.batch_records import batch_record
from els_service.engine.device import Device, DeviceLostError, Outcome
from els_service.engine.loaded_model import Chunk, LoadedModel, PendingRequest, Statistics, answers
from els_service.engine.request_context import Observer, RequestContext, allows, timed_out
from els_service.engine.room import Reservation, Room
from els_service.errors import DeadlineExceededError, ElsError, QueueFullError

INLINE_S = 1e-4
"""Shorter work runs on the event loop: handing it over would take as long."""
_SLOW_S = 10 * INLINE_S
_WRONG = 3
"""So many answers in a row that were slow, and they are no work for the event loop."""
_SHORT_S = 0.01
"""Predicted time of a batch whose launch costs nothing: others get their turn after it."""
_LAUNCH_SHARE = 0.2
"""Part of a batch that its launch may be; batches grow until it is."""
_HAND_OUT_S = 0.002
"""Of a deadline: an answer that is computed has yet to be handed out."""
_PURGE_S = 0.1
"""How often a full queue is searched for items that are late."""
_LEAST_RETRY_S = 0.05

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
        observer: told of everything.
        lost: called when a device can compute no more.
        clock: in seconds; deadlines are on it.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        scheduling: Scheduling,
        memory: Room,
        observer: Observer,
        lost: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._devices, self._limits, self._observer = devices, scheduling, observer
        self._memory, self._lost, self.clock = memory, lost, clock
        self._busy: dict[str, float] = {}
        """Device → when its batch is predicted to end."""
        self._waiting_models: dict[LoadedModel, None] = {}
        """Those with something waiting."""
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
            self._admit(loaded, query, context, estimate, now)
            self._reserve(loaded, pending, estimate)
        pending.answer.add_done_callback(partial(self._on_done, loaded, pending))
        most = self._batch_s(loaded) / max(loaded.costs.marginal(1.0), 1e-9)
        if not loaded.queue and loaded not in self._waiting_models:
            loaded.virtual = max(loaded.virtual, self._virtual)
        for chunk in pending.split(estimate, most):
            loaded.queue.push(chunk, now)
        self._waiting_models[loaded] = None
        self._dispatch()
        return pending.answer

    def enter(
        self,
        loaded: LoadedModel,
        query: Query,
        context: RequestContext,
        reservation: Reservation,
        *,
        decodes: bool,
    ) -> None:
        """Admit a trajectory by its first question: it holds room for one step from now on.

        Args:
            loaded: model whose denoiser is asked.
            query: the first question; those to come take about as long.
            context: deadline, priority and caller.
            reservation: of the trajectory.
            decodes: whether its latents are decoded in the end.

        Raises:
            QueueFullError: More work waits than is allowed, and the caller has its share of it.
            DeadlineExceededError: The first answer would come too late.
        """
        estimate = loaded.denoiser.predict_seconds(query)
        if estimate >= INLINE_S or loaded.running:
            self._admit(loaded, query, context, estimate, self.clock())
        asked = [loaded, loaded.decoder] if decodes and loaded.decoder is not None else [loaded]
        parts = []
        for each in asked:
            seconds = each.costs.marginal(each.denoiser.predict_seconds(query))
            # One that is alone may take longer than all that may wait.
            parts.append((each.seconds, min(seconds, self._limits.queue_s)))
        self.reserve(loaded.model, loaded.statistics, reservation, parts)

    def reserve(
        self,
        model: str,
        statistics: Statistics,
        reservation: Reservation,
        parts: Sequence[tuple[Room, float]],
    ) -> None:
        """Hold parts of rooms, and count a request for which there is none.

        Raises:
            QueueFullError: There is no room.
        """
        try:
            reservation.reserve(parts)
        except QueueFullError:
            self._observer.on_dropped(model, "rejected_full")
            statistics.failed.add(0.0)
            raise

    def waiting(self) -> int:
        """Return how many items wait."""
        return sum(len(loaded.queue) for loaded in self._waiting_models)

    def interrupt(self, error: ElsError) -> None:
        """Fail everything that waits or is being computed."""
        pending_requests = [
            chunk.pending for loaded in self._waiting_models for chunk in loaded.queue
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
            raise self._too_late(
                loaded,
                f"the deadline of a question to {loaded.model} passed before it was computed",
            )
        try:
            answer = loaded.denoiser.denoise(query)
        except BaseException:
            self._on_inline(loaded, len(query), estimate, began, succeeded=False)
            self._observer.on_dropped(loaded.model, "faulted")
            raise
        seconds = self._on_inline(loaded, len(query), estimate, began, succeeded=True)
        if context.trace is not None:
            traced, span = [(context.trace, began)], (began, began + seconds)
            self._observer.on_batch(
                batch_record(loaded.model, "cpu", traced, len(query), estimate, span, self.clock)
            )
        return answer

    def _on_inline(
        self, loaded: LoadedModel, images: int, estimate: float, began: float, *, succeeded: bool
    ) -> float:
        """Count a query that was computed on the event loop; return the seconds that took."""
        seconds = self.clock() - began
        loaded.slow = loaded.slow + 1 if seconds > _SLOW_S else 0
        self._observer.on_computed(loaded.model, seconds, images, estimate)
        loaded.statistics.at_once(images, seconds, time.time(), succeeded=succeeded)
        return seconds

    def _admit(
        self,
        loaded: LoadedModel,
        query: Query,
        context: RequestContext,
        estimate: float,
        now: float,
    ) -> None:
        """Raise if the answer would come too late; drop what is, where the queue is crowded."""
        own = loaded.costs.seconds(estimate)
        if loaded.queue and _is_crowded(loaded, query, own):
            self._drop_expired(loaded, now)
        slack = context.deadline - now
        if slack > 0 and not loaded.costs.may_refuse(estimate, slack, now):
            return
        wait = self._busy_for(loaded, now)
        everything = wait + own + sum(other.waiting_s for other in self._waiting_models)
        if everything <= slack:
            return
        predicted = self._predict(loaded, context, estimate, wait)
        if predicted > slack:
            raise self._too_late(
                loaded,
                f"the answer of {loaded.model} is predicted in {predicted:.3g} s, of which "
                f"{max(predicted - own, 0.0):.3g} s waiting; {allows(slack)}",
                retry_after_s=max(_LEAST_RETRY_S, predicted - slack),
            )

    def _too_late(
        self, loaded: LoadedModel, text: str, retry_after_s: float | None = None
    ) -> DeadlineExceededError:
        """Count a query that is refused for its deadline, and return what its caller is told."""
        self._observer.on_dropped(loaded.model, "rejected_late")
        loaded.statistics.failed.add(0.0)
        return DeadlineExceededError(text, retry_after_s=retry_after_s)

    def _reserve(self, loaded: LoadedModel, pending: PendingRequest, estimate: float) -> None:
        """Take room for a query, from other callers where need be, or raise QueueFullError."""
        size = pending.query.nbytes
        parts = [(loaded.seconds, loaded.costs.marginal(estimate)), (loaded.bytes, float(size))]
        if not loaded.queue:
            # It may be as large as it likes, whatever trajectories hold that ask nothing now.
            parts = [(room, room.up_to(amount)) for room, amount in parts]
        parts.append((self._memory, size))
        reservation = Reservation(pending.caller, partial(self._evict, loaded, pending))
        self.reserve(loaded.model, loaded.statistics, reservation, parts)
        pending.reservation = reservation

    def _evict(self, loaded: LoadedModel, pending: PendingRequest, error: QueueFullError) -> None:
        self._observer.on_dropped(loaded.model, "evicted")
        loaded.statistics.failed.add(self.clock() - pending.since)
        loaded.withdraw(pending)
        _fail(pending, error)

    def _predict(
        self, loaded: LoadedModel, context: RequestContext, estimate: float, wait: float
    ) -> float:
        """Return in how many seconds an answer can be expected."""
        ahead = loaded.costs.marginal(
            loaded.queue.ahead_of(context.name(), context.priority, estimate)
        )
        here = loaded.costs.seconds(estimate) - loaded.costs.marginal(estimate) + ahead
        # Models share their devices evenly, too.
        others = sum(
            min(other.waiting_s, here)
            for other in self._waiting_models
            if other is not loaded and not other.denoisers.keys().isdisjoint(loaded.denoisers)
        )
        return wait + (here + others) / len(loaded.denoisers)

    def _busy_for(self, loaded: LoadedModel, now: float) -> float:
        """Return in how many seconds the first of a model's devices is predicted to be free."""
        return max(0.0, min(self._busy.get(name, now) for name in loaded.denoisers) - now)

    def _drop_expired(self, loaded: LoadedModel, now: float) -> None:
        """Drop what is late already."""
        if now - loaded.purged > _PURGE_S:
            loaded.purged = now
            for chunk in list(loaded.queue):
                if chunk.waiting and now > chunk.pending.context.deadline:
                    self._expire(loaded, chunk.pending, now)

    def _dispatch(self) -> None:
        """Give every idle device its next batch."""
        for device in self._devices:
            while device.name not in self._busy:
                now = self.clock()
                loaded = self._next_lane(device.name, now)
                if loaded is None:
                    break
                batch = self._next_batch(loaded, now)
                if not loaded.queue:
                    self._waiting_models.pop(loaded, None)
                if batch:
                    self._launch(device, loaded, batch, now)

    def _next_lane(self, device: str, now: float) -> LoadedModel | None:
        """Return the model with the most urgent chunk; of several, the one that had least time."""
        here = [loaded for loaded in self._waiting_models if device in loaded.denoisers]
        if len(here) < 2:
            return here[0] if here else None
        return min(here, key=lambda loaded: (loaded.queue.next_priority(now), loaded.virtual))

    def _next_batch(self, loaded: LoadedModel, now: float) -> list[Chunk]:
        """Take from the queue what is worth computing and can be computed in time, together."""
        batch: list[Chunk] = []
        estimate, first_deadline = 0.0, float("inf")
        longest = self._batch_s(loaded)
        upper_bound = loaded.costs.upper_bound if loaded.costs.is_calibrated(now) else _nothing
        until = now + _HAND_OUT_S
        while chunk := loaded.queue.peek(now):
            deadline = chunk.pending.context.deadline
            if until + upper_bound(chunk.cost) > deadline:
                self._expire(loaded, chunk.pending, now)
                continue
            together = estimate + chunk.cost
            if batch and (
                loaded.costs.seconds(together) > longest
                or until + upper_bound(together) > min(first_deadline, deadline)
            ):
                break
            loaded.take(chunk, now)
            batch.append(chunk)
            estimate, first_deadline = together, min(first_deadline, deadline)
        return batch

    def _batch_s(self, loaded: LoadedModel) -> float:
        """Return the predicted time that a batch should take, if there is so much to do."""
        return min(self._limits.batch_s, max(_SHORT_S, loaded.costs.fixed_s / _LAUNCH_SHARE))

    def _launch(self, device: Device, loaded: LoadedModel, batch: list[Chunk], now: float) -> None:
        estimate = sum(chunk.cost for chunk in batch)
        cost = loaded.costs.seconds(estimate)
        self._busy[device.name] = now + cost
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
            delay = max(0.0, latest - now) + _HAND_OUT_S
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
        ended = self._busy.pop(device.name)
        running = self._batches.pop(device.name)
        if running.timer is not None:
            running.timer.cancel()
        loaded.running -= 1
        error = done.exception()
        if isinstance(error, DeviceLostError):
            # It stays busy for ever: nothing else is sent there.
            self._busy[device.name] = float("inf")
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
            _fail(pending, DeadlineExceededError(f"{loaded.model} took {late:.3g} s too long"))
        elif isinstance(result, Exception):
            self._observer.on_dropped(loaded.model, "faulted")
            loaded.statistics.failed.add(now - pending.since)
            _fail(pending, result)
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

    def _expire(self, loaded: LoadedModel, pending: PendingRequest, now: float) -> None:
        self._observer.on_dropped(loaded.model, "expired")
        loaded.statistics.failed.add(now - pending.since)
        # At once, not when the future's callback runs: the caller of this looks at the queue next.
        loaded.withdraw(pending)
        left = pending.context.deadline - now
        state = f"passed {-left:.3g} s ago" if left < 0 else f"in {left:.3g} s cannot be met"
        _fail(
            pending,
            DeadlineExceededError(
                f"waited {now - pending.since:.3g} s in the queue of {loaded.model}: "
                f"the deadline {state}"
            ),
        )

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
            self._waiting_models.pop(loaded, None)


def _is_crowded(loaded: LoadedModel, query: Query, seconds: float) -> bool:
    """Return whether a query finds room only where others give way."""
    return any(
        room.budget.used + amount > room.budget.capacity
        for room, amount in ((loaded.seconds, seconds), (loaded.bytes, query.nbytes))
    )


def _fail(pending: PendingRequest, error: Exception) -> None:
    if not pending.answer.done():
        pending.answer.set_exception(error)


def _nothing(_: float) -> float:
    return 0.0
