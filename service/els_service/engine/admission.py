"""Admission: which queries may wait for a device, and which of those that wait are dropped.

A query is rejected on arrival if it would be late by prediction, or if its caller already has its
share of a queue or of the memory. Otherwise it holds room until it is answered; the newest requests
of the caller that holds most are evicted where others need room.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from els_service.config import Scheduling
from els_service.denoisers.base import Query
from els_service.engine.batching import INLINE_S
from els_service.engine.loaded_model import LoadedModel, PendingRequest, Statistics
from els_service.engine.request_context import Observer, RequestContext, allows
from els_service.engine.reservations import NamedBudget, Reservation
from els_service.errors import DeadlineExceededError, QueueFullError

_LEAST_RETRY_S = 0.05
_PURGE_S = 0.1


class Workload:
    """Models with waiting requests, and the devices that are busy."""

    def __init__(self) -> None:
        self.waiting: dict[LoadedModel, None] = {}
        """Models with something waiting, in the order in which that began."""
        self.busy: dict[str, float] = {}
        """Device → when its batch is predicted to end."""

    def busy_for(self, loaded: LoadedModel, now: float) -> float:
        """Return in how many seconds the first of a model's devices is predicted to be free."""
        return max(0.0, min(self.busy.get(name, now) for name in loaded.denoisers) - now)


class Admission:
    """Admission control of all queues.

    Args:
        workload: of the scheduler.
        limits: bounds of queues.
        memory: room for the bytes of all that waits or is computed, of all models.
        observer: receives a callback for each query that is rejected or dropped.
        clock: in seconds; deadlines are on it.
    """

    def __init__(
        self,
        workload: Workload,
        limits: Scheduling,
        memory: NamedBudget,
        observer: Observer,
        clock: Callable[[], float],
    ) -> None:
        self._workload, self._limits, self._memory = workload, limits, memory
        self._observer, self._clock = observer, clock

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
            self.check_deadline(loaded, query, context, estimate, self._clock())
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
        parts: Sequence[tuple[NamedBudget, float]],
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

    def check_deadline(
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
        wait = self._workload.busy_for(loaded, now)
        everything = wait + own + sum(other.waiting_s for other in self._workload.waiting)
        if everything <= slack:
            return
        predicted = self._predict(loaded, context, estimate, wait)
        if predicted > slack:
            raise self.too_late(
                loaded,
                f"the answer of {loaded.model} is predicted in {predicted:.3g} s, of which "
                f"{max(predicted - own, 0.0):.3g} s waiting; {allows(slack)}",
                retry_after_s=max(_LEAST_RETRY_S, predicted - slack),
            )

    def reserve_for(self, loaded: LoadedModel, pending: PendingRequest, estimate: float) -> None:
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

    def too_late(
        self, loaded: LoadedModel, text: str, retry_after_s: float | None = None
    ) -> DeadlineExceededError:
        """Count a query rejected for its deadline, and return the error of its caller."""
        self._observer.on_dropped(loaded.model, "rejected_late")
        loaded.statistics.failed.add(0.0)
        return DeadlineExceededError(text, retry_after_s=retry_after_s)

    def expire(self, loaded: LoadedModel, pending: PendingRequest, now: float) -> None:
        """Drop a request whose deadline has passed, or cannot be met."""
        self._observer.on_dropped(loaded.model, "expired")
        loaded.statistics.failed.add(now - pending.since)
        # At once, not when the future's callback runs: the caller of this looks at the queue next.
        loaded.withdraw(pending)
        left = pending.context.deadline - now
        state = f"passed {-left:.3g} s ago" if left < 0 else f"in {left:.3g} s cannot be met"
        fail(
            pending,
            DeadlineExceededError(
                f"waited {now - pending.since:.3g} s in the queue of {loaded.model}: "
                f"the deadline {state}"
            ),
        )

    def _evict(self, loaded: LoadedModel, pending: PendingRequest, error: QueueFullError) -> None:
        self._observer.on_dropped(loaded.model, "evicted")
        loaded.statistics.failed.add(self._clock() - pending.since)
        loaded.withdraw(pending)
        fail(pending, error)

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
            for other in self._workload.waiting
            if other is not loaded and not other.denoisers.keys().isdisjoint(loaded.denoisers)
        )
        return wait + (here + others) / len(loaded.denoisers)

    def _drop_expired(self, loaded: LoadedModel, now: float) -> None:
        """Drop what is late already."""
        if now - loaded.purged > _PURGE_S:
            loaded.purged = now
            for chunk in list(loaded.queue):
                if chunk.waiting and now > chunk.pending.context.deadline:
                    self.expire(loaded, chunk.pending, now)


def _is_crowded(loaded: LoadedModel, query: Query, seconds: float) -> bool:
    """Return whether a query finds room only where others give way."""
    return any(
        room.budget.used + amount > room.budget.capacity
        for room, amount in ((loaded.seconds, seconds), (loaded.bytes, query.nbytes))
    )


def fail(pending: PendingRequest, error: Exception) -> None:
    """Answer a request with an error, unless it is answered."""
    if not pending.answer.done():
        pending.answer.set_exception(error)
