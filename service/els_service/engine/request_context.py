"""Scheduling context of a request, and the observer of queries and batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

PRIORITIES = 3
"""Levels of priority; 1 is first."""
DEFAULT_PRIORITY = 2
_ON_ITS_WAY_S = 0.05


@dataclass(slots=True)  # never changed; frozen would cost every call a microsecond
class RequestContext:
    """On which terms a query is answered."""

    deadline: float = math.inf
    """On the engine's clock; an answer after it is of no use."""
    priority: int = DEFAULT_PRIORITY
    caller: str | Callable[[], str] = ""
    """Whose it is, or who knows: callers of one priority share a device evenly. Only queries that
    have to wait are asked for it."""
    trace: object = None
    """Handed back to the observer, who knows what it is."""

    def name(self) -> str:
        """Return the caller's name."""
        return self.caller if isinstance(self.caller, str) else self.caller()


def allows(slack_s: float) -> str:
    """Return the end of a refusal for a deadline: the time allowed, and what to raise."""
    return (
        f"{slack_s:.3g} s are left of the time allowed: raise the call's deadline"
        " (timeout_s, --timeout)"
    )


def timed_out(left_s: float) -> bool:
    """Return whether a query that is given up on is late, not its caller who changed its mind.

    A caller gives up by its own clock, and the request was on its way for a while.

    Args:
        left_s: until the deadline as it is known here.
    """
    return left_s <= _ON_ITS_WAY_S


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """One batch that was computed, for traces; times in nanoseconds since the epoch."""

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
    """When each query came."""


class Observer(Protocol):
    """Told of everything that happens to queries; times in seconds. Called on the event loop."""

    def on_queued(self, model: str, seconds: float) -> None:
        """One query waited this long; not called where there was no queue."""
        ...

    def on_computed(self, model: str, seconds: float, images: int, cost: float) -> None:
        """One batch took ``seconds``, and ``cost`` had been predicted."""
        ...

    def on_dropped(self, model: str, reason: str) -> None:
        """One query got no answer, for one of ``REASONS``."""
        ...

    def on_batch(self, launch: BatchRecord) -> None:
        """One batch of which a member is traced was computed."""
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
"""Refused because the queue is full, or because the answer would come too late; its deadline passed
while it waited; its caller left before it was computed, or while it was; computing it failed; the
server had to end; it gave way to other callers, as its own held most."""
