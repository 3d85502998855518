"""Memory of trajectories, and of requests that wait for their model to be reloaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from els_service.engine.admission import Admission
from els_service.engine.model_versions import ModelVersion
from els_service.engine.request_context import Observer, RequestContext
from els_service.engine.reservations import NamedBudget, TrajectoryReservation


class RequestMemory:
    """Reservations of memory by requests that are not in a queue.

    Args:
        memory: budget of bytes in flight.
        admission: evicts other requests for a new one.
        observer: receives a callback for each dropped request.
    """

    def __init__(self, memory: NamedBudget, admission: Admission, observer: Observer) -> None:
        self._memory, self._admission, self._observer = memory, admission, observer
        self._unended: Counter[str] = Counter()
        """Caller → bytes of its trajectories that have not ended, evicted ones included."""

    @contextmanager
    def reserved(
        self, served: ModelVersion, size: int, context: RequestContext
    ) -> Iterator[TrajectoryReservation]:
        """Reserve ``size`` bytes within the context.

        Raises:
            QueueFullError: The memory is full.
        """

        def on_evicted() -> None:
            self._observer.on_dropped(served.model, "evicted")
            served.statistics.failed.add(0.0)

        reservation = TrajectoryReservation(context.name(), on_evicted)
        parts = ((self._memory, float(size)),)
        self._admission.reserve(served.model, served.statistics, reservation.held, parts)
        try:
            yield reservation
        finally:
            reservation.held.release()

    @contextmanager
    def trajectory(
        self, served: ModelVersion, size: int, context: RequestContext
    ) -> Iterator[TrajectoryReservation]:
        """Reserve ``size`` bytes for a generator that a caller reads.

        The generator of an evicted trajectory still holds its state until the caller has read the
        error. Including these, a caller may hold the whole capacity, and all callers together
        twice as much.

        Raises:
            QueueFullError: The memory is full, or that bound would be exceeded.
        """
        unended, caller = self._unended, context.name()
        most = self._memory.budget.capacity
        own, everybody = unended[caller], unended.total()
        if (own and own + size > most) or (everybody and everybody + size > 2 * most):
            self._observer.on_dropped(served.model, "rejected_full")
            raise self._memory.full(caller, size)
        unended[caller] += size
        try:
            with self.reserved(served, size, context) as reservation:
                yield reservation
        finally:
            unended[caller] -= size
            if not unended[caller]:
                del unended[caller]
