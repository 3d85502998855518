"""Scheduling context of a request, and the observer of queries and batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

PRIORITIES = 3
"""Number of priorities; 1 is the highest."""
DEFAULT_PRIORITY = 2
_ON_ITS_WAY_S = 0.05


@dataclass(slots=True)  # never changed; frozen would cost every call a microsecond
class RequestContext:
    """Scheduling context of a request."""

    deadline: float = math.inf
    """Time on the engine's clock after which an answer is useless."""
    priority: int = DEFAULT_PRIORITY
    caller: str | Callable[[], str] = ""
    """Name of the caller, or a function that returns it, called only for queries that wait. Callers
    of one priority share a device evenly."""
    trace: object = None
    """Trace of the request, opaque to the engine, for the observer."""

    def name(self) -> str:
        """Return the caller's name."""
        return self.caller if isinstance(self.caller, str) else self.caller()


def timed_out(left_s: float) -> bool:
    """Return whether a cancelled query timed out at its caller, rather than being abandoned.

    The caller's clock started earlier, by the time that the request was in transit.

    Args:
        left_s: seconds until the deadline as the server knows it.
    """
    return left_s <= _ON_ITS_WAY_S


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """Record of a computed batch, for traces; times in nanoseconds since the epoch."""

    model: str
    device: str
    started_ns: int
    ended_ns: int
    images: int
    cost: float
    """Predicted seconds."""
    members: tuple[object, ...]
    """``RequestContext.trace`` of each query."""
    queued_ns: tuple[int, ...]
    """Arrival time of each query."""


class Observer(Protocol):
    """Callbacks for query and batch events, on the event loop; times in seconds."""

    def on_queued(self, model: str, seconds: float) -> None:
        """Called with the waiting time of a query; not called for queries computed on arrival."""
        ...

    def on_computed(self, model: str, seconds: float, images: int, cost: float) -> None:
        """Called with the measured seconds of a batch, and with the predicted ``cost``."""
        ...

    def on_dropped(self, model: str, reason: str) -> None:
        """Called for a query without an answer, with one of ``REASONS``."""
        ...

    def on_batch(self, record: BatchRecord) -> None:
        """Called for a computed batch with a traced member."""
        ...


REASONS = (
    "rejected_full",
    "rejected_late",
    "expired",
    "cancelled",
    "discarded",
    "faulted",
    "interrupted",
    "evicted",
)
"""Rejected on arrival: queue full, or late by prediction. Dropped: deadline passed while waiting;
cancelled before, or during, its computation; computation failed; server stopped; evicted because
its caller held most."""
