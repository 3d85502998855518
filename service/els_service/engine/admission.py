"""Admission control: rejection of queries on arrival, and eviction of waiting ones.

A query is rejected on arrival if it would be late by prediction, or if its caller already has its
share of a queue or of the memory. An admitted query holds parts of budgets until it is answered.
When other callers need their share, the newest requests of the caller that holds most are evicted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from els_service.config import Scheduling
from els_service.denoisers.base import Query
from els_service.engine.batching import INLINE_S
from els_service.engine.loaded_model import LoadedModel, PendingRequest, Statistics
from els_service.engine.request_context import Observer, RequestContext
from els_service.engine.reservations import NamedBudget, Reservation
from els_service.errors import DeadlineExceededError, QueueFullError

_LEAST_RETRY_S = 0.05
_PURGE_S = 0.1


class Workload:
    """Models with waiting requests, and the devices that are busy."""

    def __init__(self) -> None:
        self.waiting: dict[LoadedModel, None] = {}
        """Models with waiting chunks, in the order in which their queues began to fill."""
        self.busy: dict[str, float] = {}
        """Device → predicted end of its batch."""

    def busy_for(self, loaded: LoadedModel, now: float) -> float:
        """Return the predicted seconds until one of a model's devices is idle."""
        return max(0.0, min(self.busy.get(name, now) for name in loaded.denoisers) - now)


class Admission:
    """Admission control of all queues.

    Args:
        workload: workload of the scheduler.
        limits: bounds of queues.
        memory: budget for the bytes of all waiting and computed requests.
        observer: receives a callback for each query that is rejected or dropped.
        clock: clock of deadlines, in seconds.
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
        """Admit a trajectory by its longest query: reserves the time of a step for its whole life.

        Args:
            loaded: model of the trajectory.
            query: the one that takes longest.
            context: deadline, priority and caller.
            reservation: reservation of the trajectory.
            decodes: whether its final latents are decoded.

        Raises:
            QueueFullError: A budget is full and the caller has its share of it.
            DeadlineExceededError: The answer to it would be late.
        """
        estimate = loaded.denoiser.predict_seconds(query)
        if estimate >= INLINE_S or loaded.running:
            self.check_deadline(loaded, query, context, estimate, self._clock())
        used = [loaded, loaded.decoder] if decodes and loaded.decoder is not None else [loaded]
        parts = []
        for each in used:
            seconds = each.costs.marginal(each.denoiser.predict_seconds(query))
            # A trajectory that is alone may exceed the budget.
            parts.append((each.seconds, min(seconds, self._limits.queue_s)))
        self.reserve(loaded.model, loaded.statistics, reservation, parts)

    def reserve(
        self,
        model: str,
        statistics: Statistics,
        reservation: Reservation,
        parts: Sequence[tuple[NamedBudget, float]],
    ) -> None:
        """Reserve parts of budgets; counts a rejected request.

        Raises:
            QueueFullError: A part does not fit.
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
        """Raise if the answer would be late; first drops late chunks of a full queue."""
        own = loaded.costs.seconds(estimate)
        if loaded.queue and _is_crowded(loaded, query, own):
            self._drop_expired(loaded, now)
        slack = context.deadline - now
        if slack > 0 and not loaded.costs.may_reject(estimate, slack, now):
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
                f"{max(predicted - own, 0.0):.3g} s waiting",
                retry_after_s=max(_LEAST_RETRY_S, predicted - slack),
                left_s=slack,
            )

    def reserve_for(self, loaded: LoadedModel, pending: PendingRequest, estimate: float) -> None:
        """Reserve budgets for a query, if need be by evictions, or raise QueueFullError."""
        size = pending.query.nbytes
        parts = [(loaded.seconds, loaded.costs.marginal(estimate)), (loaded.bytes, float(size))]
        if not loaded.queue:
            # A query that is alone may be of any size, whatever idle trajectories have reserved.
            parts = [(named, named.up_to(amount)) for named, amount in parts]
        parts.append((self._memory, size))
        reservation = Reservation(pending.caller, partial(self._evict, loaded, pending))
        self.reserve(loaded.model, loaded.statistics, reservation, parts)
        pending.reservation = reservation

    def too_late(
        self,
        loaded: LoadedModel,
        text: str,
        retry_after_s: float | None = None,
        left_s: float | None = None,
    ) -> DeadlineExceededError:
        """Count a query rejected for its deadline, and return its error."""
        self._observer.on_dropped(loaded.model, "rejected_late")
        loaded.statistics.failed.add(0.0)
        return DeadlineExceededError(text, retry_after_s=retry_after_s, left_s=left_s)

    def expire(self, loaded: LoadedModel, pending: PendingRequest, now: float) -> None:
        """Drop a request whose deadline has passed, or cannot be met."""
        self._observer.on_dropped(loaded.model, "expired")
        loaded.statistics.failed.add(now - pending.since)
        # Now, not in the future's callback, because the caller reads the queue next.
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
        """Return the predicted seconds until the answer."""
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
        """Drop chunks past their deadline."""
        if now - loaded.purged > _PURGE_S:
            loaded.purged = now
            for chunk in list(loaded.queue):
                if chunk.waiting and now > chunk.pending.context.deadline:
                    self.expire(loaded, chunk.pending, now)


def _is_crowded(loaded: LoadedModel, query: Query, seconds: float) -> bool:
    """Return whether a query would fit only by evictions."""
    return any(
        named.budget.used + amount > named.budget.capacity
        for named, amount in ((loaded.seconds, seconds), (loaded.bytes, query.nbytes))
    )


def fail(pending: PendingRequest, error: Exception) -> None:
    """Fail a request, unless it is answered."""
    if not pending.answer.done():
        pending.answer.set_exception(error)
