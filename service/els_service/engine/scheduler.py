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
        if all(i.ticket.answer.done() or now >= i.ticket.terms.deadline for i in self.batch):
            self.control.stop()


class Scheduler:
    """All queues and all devices of a process.

    Args:
        devices: by which lanes name their denoisers.
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
        self._devices, self._terms, self._observer = devices, scheduling, observer
        self._memory, self._lost, self.clock = memory, lost, clock
        self._busy: dict[str, float] = {}
        """Device → when its batch is predicted to end."""
        self._lanes: dict[LoadedModel, None] = {}
        """Those with something waiting."""
        self._running: Counter[PendingRequest] = Counter()
        """Tickets with parts that are being computed, and how many."""
        self._batches: dict[str, _Running] = {}
        """Device → what it computes."""
        self._virtual = 0.0

    def submit(
        self, lane: LoadedModel, query: Query, terms: RequestContext, *, admitted: bool = False
    ) -> Denoised | asyncio.Future[Denoised]:
        """Return the answer to a checked query, or the answer to come.

        Cancelling the future takes the query out of the queue.

        Args:
            lane: whose denoiser answers.
            query: passed ``Denoiser.check``.
            terms: deadline, priority and caller.
            admitted: whether it belongs to a trajectory, which has entered: then it always queues.

        Raises:
            QueueFullError: More work waits than is allowed, and the caller has its share of it.
            DeadlineExceededError: The answer would come too late. The future may fail with either.
        """
        estimate = lane.denoiser.predict_seconds(query)
        # By the estimate, not by the clock: on a busy machine all takes longer, queues above all.
        if estimate < INLINE_S and lane.slow < _WRONG and not lane.running and lane.on_cpu:
            return self._inline(lane, query, terms, estimate)
        now = self.clock()
        ticket = PendingRequest(lane.model, query, terms, now)
        if not admitted:
            self._admit(lane, query, terms, estimate, now)
            self._reserve(lane, ticket, estimate)
        ticket.answer.add_done_callback(partial(self._left, lane, ticket))
        most = self._batch_s(lane) / max(lane.costs.marginal(1.0), 1e-9)
        if not lane.queue and lane not in self._lanes:
            lane.virtual = max(lane.virtual, self._virtual)
        for item in ticket.cut(estimate, most):
            lane.queue.push(item, now)
        self._lanes[lane] = None
        self._dispatch()
        return ticket.answer

    def enter(
        self,
        lane: LoadedModel,
        query: Query,
        terms: RequestContext,
        reservation: Reservation,
        *,
        decodes: bool,
    ) -> None:
        """Admit a trajectory by its first question: it holds room for one step from now on.

        Args:
            lane: whose denoiser is asked.
            query: the first question; those to come take about as long.
            terms: deadline, priority and caller.
            reservation: of the trajectory.
            decodes: whether its latents are decoded in the end.

        Raises:
            QueueFullError: More work waits than is allowed, and the caller has its share of it.
            DeadlineExceededError: The first answer would come too late.
        """
        estimate = lane.denoiser.predict_seconds(query)
        if estimate >= INLINE_S or lane.running:
            self._admit(lane, query, terms, estimate, self.clock())
        asked = [lane, lane.decoder] if decodes and lane.decoder is not None else [lane]
        parts = []
        for each in asked:
            seconds = each.costs.marginal(each.denoiser.predict_seconds(query))
            # One that is alone may take longer than all that may wait.
            parts.append((each.seconds, min(seconds, self._terms.queue_s)))
        self.reserve(lane.model, lane.statistics, reservation, parts)

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
            self._observer.dropped(model, "rejected_full")
            statistics.failed.add(0.0)
            raise

    def waiting(self) -> int:
        """Return how many items wait."""
        return sum(len(lane.queue) for lane in self._lanes)

    def interrupt(self, error: ElsError) -> None:
        """Fail everything that waits or is being computed."""
        tickets = [item.ticket for lane in self._lanes for item in lane.queue]
        for ticket in [*tickets, *self._running]:
            if not ticket.answer.done():
                self._observer.dropped(ticket.model, "interrupted")
                ticket.answer.set_exception(error)

    def _inline(
        self, lane: LoadedModel, query: Query, terms: RequestContext, estimate: float
    ) -> Denoised:
        began, answer = self.clock(), None
        if began > terms.deadline:
            raise self._too_late(
                lane, f"the deadline of a question to {lane.model} passed before it was computed"
            )
        try:
            answer = lane.denoiser.denoise(query)
            return answer
        finally:
            seconds, images = self.clock() - began, len(query)
            lane.slow = lane.slow + 1 if seconds > _SLOW_S else 0
            self._observer.computed(lane.model, seconds, images, estimate)
            succeeded = answer is not None
            lane.statistics.at_once(images, seconds, time.time(), succeeded=succeeded)
            if not succeeded:
                self._observer.dropped(lane.model, "faulted")
            if terms.trace is not None:
                traced = [(terms.trace, began)]
                span = began, began + seconds
                launched = batch_record(
                    lane.model, "cpu", traced, images, estimate, span, self.clock
                )
                self._observer.launched(launched)

    def _admit(
        self, lane: LoadedModel, query: Query, terms: RequestContext, estimate: float, now: float
    ) -> None:
        """Raise if the answer would come too late; drop what is, where the queue is crowded."""
        own = lane.costs.seconds(estimate)
        if lane.queue and _is_crowded(lane, query, own):
            self._purge(lane, now)
        slack = terms.deadline - now
        if slack > 0 and not lane.costs.may_refuse(estimate, slack, now):
            return
        wait = self._busy_for(lane, now)
        everything = wait + own + sum(other.waiting_s for other in self._lanes)
        if everything <= slack:
            return
        predicted = self._predict(lane, terms, estimate, wait)
        if predicted > slack:
            raise self._too_late(
                lane,
                f"the answer of {lane.model} is predicted in {predicted:.3g} s, of which "
                f"{max(predicted - own, 0.0):.3g} s waiting; {allows(slack)}",
                retry_after_s=max(_LEAST_RETRY_S, predicted - slack),
            )

    def _too_late(
        self, lane: LoadedModel, text: str, retry_after_s: float | None = None
    ) -> DeadlineExceededError:
        """Count a query that is refused for its deadline, and return what its caller is told."""
        self._observer.dropped(lane.model, "rejected_late")
        lane.statistics.failed.add(0.0)
        return DeadlineExceededError(text, retry_after_s=retry_after_s)

    def _reserve(self, lane: LoadedModel, ticket: PendingRequest, estimate: float) -> None:
        """Take room for a query, from other callers where need be, or raise QueueFullError."""
        size = ticket.query.nbytes
        parts = [(lane.seconds, lane.costs.marginal(estimate)), (lane.bytes, float(size))]
        if not lane.queue:
            # It may be as large as it likes, whatever trajectories hold that ask nothing now.
            parts = [(room, room.up_to(amount)) for room, amount in parts]
        parts.append((self._memory, size))
        reservation = Reservation(ticket.caller, partial(self._evict, lane, ticket))
        self.reserve(lane.model, lane.statistics, reservation, parts)
        ticket.reservation = reservation

    def _evict(self, lane: LoadedModel, ticket: PendingRequest, error: QueueFullError) -> None:
        self._observer.dropped(lane.model, "evicted")
        lane.statistics.failed.add(self.clock() - ticket.since)
        lane.withdraw(ticket)
        _fail(ticket, error)

    def _predict(
        self, lane: LoadedModel, terms: RequestContext, estimate: float, wait: float
    ) -> float:
        """Return in how many seconds an answer can be expected."""
        ahead = lane.costs.marginal(lane.queue.ahead_of(terms.name(), terms.priority, estimate))
        here = lane.costs.seconds(estimate) - lane.costs.marginal(estimate) + ahead
        # Models share their devices evenly, too.
        others = sum(
            min(other.waiting_s, here)
            for other in self._lanes
            if other is not lane and not other.denoisers.keys().isdisjoint(lane.denoisers)
        )
        return wait + (here + others) / len(lane.denoisers)

    def _busy_for(self, lane: LoadedModel, now: float) -> float:
        """Return in how many seconds the first of a lane's devices is predicted to be free."""
        return max(0.0, min(self._busy.get(name, now) for name in lane.denoisers) - now)

    def _purge(self, lane: LoadedModel, now: float) -> None:
        """Drop what is late already."""
        if now - lane.purged > _PURGE_S:
            lane.purged = now
            for item in list(lane.queue):
                if item.waiting and now > item.ticket.terms.deadline:
                    self._expire(lane, item.ticket, now)

    def _dispatch(self) -> None:
        """Give every idle device its next batch."""
        for device in self._devices:
            while device.name not in self._busy:
                now = self.clock()
                lane = self._next_lane(device.name, now)
                if lane is None:
                    break
                batch = self._next_batch(lane, now)
                if not lane.queue:
                    self._lanes.pop(lane, None)
                if batch:
                    self._launch(device, lane, batch, now)

    def _next_lane(self, device: str, now: float) -> LoadedModel | None:
        """Return the lane with the most urgent item; of several, the one that had least time."""
        here = [lane for lane in self._lanes if device in lane.denoisers]
        if len(here) < 2:
            return here[0] if here else None
        return min(here, key=lambda lane: (lane.queue.next_priority(now), lane.virtual))

    def _next_batch(self, lane: LoadedModel, now: float) -> list[Chunk]:
        """Take from the queue what is worth computing and can be computed in time, together."""
        batch: list[Chunk] = []
        estimate, first_deadline = 0.0, float("inf")
        longest = self._batch_s(lane)
        at_most = lane.costs.at_most if lane.costs.trusted(now) else _nothing
        until = now + _HAND_OUT_S
        while item := lane.queue.peek(now):
            deadline = item.ticket.terms.deadline
            if until + at_most(item.cost) > deadline:
                self._expire(lane, item.ticket, now)
                continue
            together = estimate + item.cost
            if batch and (
                lane.costs.seconds(together) > longest
                or until + at_most(together) > min(first_deadline, deadline)
            ):
                break
            lane.take(item, now)
            batch.append(item)
            estimate, first_deadline = together, min(first_deadline, deadline)
        return batch

    def _batch_s(self, lane: LoadedModel) -> float:
        """Return the predicted time that a batch should take, if there is so much to do."""
        return min(self._terms.batch_s, max(_SHORT_S, lane.costs.fixed_s / _LAUNCH_SHARE))

    def _launch(self, device: Device, lane: LoadedModel, batch: list[Chunk], now: float) -> None:
        estimate = sum(item.cost for item in batch)
        cost = lane.costs.seconds(estimate)
        self._busy[device.name] = now + cost
        self._virtual = lane.virtual
        lane.virtual += cost
        lane.running += 1
        for item in batch:
            waited = now - item.ticket.since
            self._observer.queued(lane.model, waited)
            lane.statistics.queued.add(waited)
            self._running[item.ticket] += 1
        work = partial(answers, lane.denoisers[device.name], [item.query for item in batch])
        running = self._batches[device.name] = self._watched(batch, now)
        done = device.run(work, self._terms.watchdog_s, predicted_s=cost, control=running.control)
        done.add_done_callback(partial(self._finish, device, lane, batch, estimate, cost))

    def _watched(self, batch: list[Chunk], now: float) -> _Running:
        """Return a batch that is stopped once its last member's deadline has passed."""
        running = _Running(batch, Control())
        latest = max(item.ticket.terms.deadline for item in batch)
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
        lane: LoadedModel,
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
        lane.running -= 1
        error = done.exception()
        if isinstance(error, DeviceLostError):
            # It stays busy for ever: nothing else is sent there.
            self._busy[device.name] = float("inf")
        elif isinstance(error, ComputationStoppedError):
            # Without an answer, but not without a lesson: it takes longer than this.
            if (seconds := self.clock() - (ended - cost)) > cost:
                lane.costs.learn(estimate, seconds, self.clock())
        elif error is None:
            outcome = done.result()
            if not any(isinstance(result, Exception) for result in outcome.value):
                lane.costs.learn(estimate, outcome.ended - outcome.began, self.clock())
                lane.slow = 0 if outcome.ended - outcome.began < _SLOW_S else lane.slow
        self._dispatch()
        if error is None:
            self._computed(device, lane, batch, cost, outcome)
            results: Sequence[Denoised | Exception] = outcome.value
        else:
            assert isinstance(error, Exception)
            results = [error] * len(batch)
        for item, result in zip(batch, results, strict=True):
            self._hand_out(lane, item, result)
        if isinstance(error, DeviceLostError):
            self._lost(str(error))

    def _hand_out(self, lane: LoadedModel, item: Chunk, result: Denoised | Exception) -> None:
        ticket = item.ticket
        self._running[ticket] -= 1
        if not self._running[ticket]:
            del self._running[ticket]
            if ticket.answer.done():
                ticket.release()
        now = self.clock()
        if ticket.answer.done():
            if ticket.answer.cancelled():
                self._observer.dropped(lane.model, "discarded")
        elif now > ticket.terms.deadline:
            self._observer.dropped(lane.model, "discarded")
            lane.statistics.failed.add(now - ticket.since)
            late = now - ticket.terms.deadline
            _fail(ticket, DeadlineExceededError(f"{lane.model} took {late:.3g} s too long"))
        elif isinstance(result, Exception):
            self._observer.dropped(lane.model, "faulted")
            lane.statistics.failed.add(now - ticket.since)
            _fail(ticket, result)
        elif ticket.deliver(item.index, result):
            lane.statistics.succeeded.add(now - ticket.since)

    def _computed(
        self, device: Device, lane: LoadedModel, batch: list[Chunk], cost: float, outcome: Results
    ) -> None:
        """Tell of a batch that was computed."""
        seconds = outcome.ended - outcome.began
        images = sum(len(item.query) for item in batch)
        self._observer.computed(lane.model, seconds, images, cost)
        lane.statistics.batch(images, seconds, time.time())
        for _ in batch:
            lane.statistics.computed.add(seconds)
        if any(item.ticket.terms.trace is not None for item in batch):
            traced = [(item.ticket.terms.trace, item.ticket.since) for item in batch]
            span = outcome.began, outcome.ended
            launched = batch_record(lane.model, device.name, traced, images, cost, span, self.clock)
            self._observer.launched(launched)

    def _expire(self, lane: LoadedModel, ticket: PendingRequest, now: float) -> None:
        self._observer.dropped(lane.model, "expired")
        lane.statistics.failed.add(now - ticket.since)
        # At once, not when the future's callback runs: the caller of this looks at the queue next.
        lane.withdraw(ticket)
        left = ticket.terms.deadline - now
        state = f"passed {-left:.3g} s ago" if left < 0 else f"in {left:.3g} s cannot be met"
        _fail(
            ticket,
            DeadlineExceededError(
                f"waited {now - ticket.since:.3g} s in the queue of {lane.model}: "
                f"the deadline {state}"
            ),
        )

    def _left(
        self, lane: LoadedModel, ticket: PendingRequest, answer: asyncio.Future[Denoised]
    ) -> None:
        """Take what still waits of a ticket out of the queue, and stop what is computed of it."""
        withdrawn = lane.withdraw(ticket)
        if ticket not in self._running:
            ticket.release()
        else:
            for running in self._batches.values():
                running.stop_unless_wanted(self.clock())
        ticket.items = []  # they know the ticket: pixels would stay until garbage is collected
        if withdrawn and answer.cancelled():
            now = self.clock()
            late = timed_out(ticket.terms.deadline - now)
            self._observer.dropped(lane.model, "expired" if late else "cancelled")
        if not lane.queue:
            self._lanes.pop(lane, None)


def _is_crowded(lane: LoadedModel, query: Query, seconds: float) -> bool:
    """Return whether a query finds room only where others give way."""
    return any(
        room.budget.used + amount > room.budget.capacity
        for room, amount in ((lane.seconds, seconds), (lane.bytes, query.nbytes))
    )


def _fail(ticket: PendingRequest, error: Exception) -> None:
    if not ticket.answer.done():
        ticket.answer.set_exception(error)


def _nothing(_: float) -> float:
    return 0.0
