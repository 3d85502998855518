"""Priority queue with start-time fair queueing between callers and no starvation.

Pure bookkeeping: no clock, no event loop. Within a level of priority this is start-time fair
queueing (Goyal, Vin & Cheng 1996): an item's tag is the virtual time at which its caller's work
before it would be done if all callers were served evenly, and the smallest tag is next. So a caller
with a thousand items delays itself, and one with a single item waits for one item of each other.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, Protocol, TypeVar

_CALLERS = 1024
"""Number of callers remembered in addition to those with waiting items."""


class Waiting(Protocol):
    """Item of a queue."""

    cost: float
    """Cost in any unit, positive."""
    size: int
    """Bytes."""
    priority: int
    caller: str
    waiting: bool
    """Whether the item is in the queue; set by the queue."""


T = TypeVar("T", bound=Waiting)


@dataclass(slots=True)
class _Level(Generic[T]):
    """Items of one priority."""

    served: float = 0.0
    """Time when an item was last taken, or the level became nonempty."""
    virtual: float = 0.0
    heap: list[tuple[float, int, T]] = field(default_factory=list)
    live: int = 0
    cost: float = 0.0
    finish: dict[str, float] = field(default_factory=dict)
    """Caller → virtual time at which all its work would be done."""
    owed: dict[str, float] = field(default_factory=dict)
    """Caller → cost of its waiting items."""


class FairQueue(Generic[T]):
    """Items by priority, then evenly by caller, then in order.

    Args:
        levels: number of priorities, from 1.
        starvation_s: seconds after which a level that was not served is next.
    """

    def __init__(self, levels: int, starvation_s: float) -> None:
        self._levels: list[_Level[T]] = [_Level() for _ in range(levels)]
        self._starvation_s = starvation_s
        self._order = count()
        self.cost = 0.0
        """Cost of all waiting items."""
        self.size = 0
        """Bytes of all waiting items."""
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[T]:
        for level in self._levels:
            yield from (item for _, _, item in level.heap if item.waiting)

    def push(self, item: T, now: float) -> None:
        """Add an item."""
        level = self._levels[item.priority - 1]
        if not level.live:
            level.served = now
        start = max(level.virtual, level.finish.get(item.caller, 0.0))
        level.finish[item.caller] = start + item.cost
        level.owed[item.caller] = level.owed.get(item.caller, 0.0) + item.cost
        heapq.heappush(level.heap, (start, next(self._order), item))
        item.waiting = True
        self._count(level, item, 1)

    def peek(self, now: float) -> T | None:
        """Return the next item without removing it."""
        level = self._next_level(now)
        return level.heap[0][2] if level else None

    def next_priority(self, now: float) -> int:
        """Return the priority of the next item."""
        item = self.peek(now)
        return item.priority if item else len(self._levels) + 1

    def take(self, item: T, now: float) -> None:
        """Remove an item that will be served."""
        level = self._levels[item.priority - 1]
        level.served = now
        level.virtual = max(level.virtual, level.heap[0][0])
        self._remove(level, item)

    def drop(self, item: T) -> None:
        """Remove an item that will not be served; a caller without waiting items is forgotten.

        A caller with waiting items keeps its virtual time: if the cost of late items were refunded,
        a flood of mostly late items would always be next.
        """
        level = self._levels[item.priority - 1]
        self._remove(level, item)
        if item.caller not in level.owed:
            level.finish.pop(item.caller, None)
        if len(level.heap) > 2 * level.live + 64:
            level.heap = [element for element in level.heap if element[2].waiting]
            heapq.heapify(level.heap)

    def ahead_of(self, caller: str, priority: int, cost: float) -> float:
        """Return the approximate cost that is served until a new item of ``cost`` is done."""
        higher = sum(level.cost for level in self._levels[: priority - 1])
        level = self._levels[priority - 1]
        own = level.owed.get(caller, 0.0) + cost
        # Evenly: while one caller's items are served, each other caller gets at most as much.
        others = sum(min(owed, own) for name, owed in level.owed.items() if name != caller)
        return higher + own + others

    def _next_level(self, now: float) -> _Level[T] | None:
        first = None
        for level in self._levels:
            if not level.live:
                continue
            while not level.heap[0][2].waiting:
                heapq.heappop(level.heap)
            if first is None:
                first = level
            elif now - level.served > self._starvation_s:
                return level
        return first

    def _remove(self, level: _Level[T], item: T) -> None:
        item.waiting = False
        self._count(level, item, -1)
        owed = level.owed[item.caller] - item.cost
        if owed > 1e-12:
            level.owed[item.caller] = owed
        else:
            del level.owed[item.caller]
        if not level.live:
            # Empty: virtual times are reset, and with them rounding errors.
            level.heap, level.finish, level.owed = [], {}, {}
            level.virtual = level.cost = 0.0
        elif len(level.finish) > len(level.owed) + _CALLERS:
            level.finish = {name: at for name, at in level.finish.items() if at > level.virtual}

    def _count(self, level: _Level[T], item: T, sign: int) -> None:
        level.live += sign
        level.cost += sign * item.cost
        self._length += sign
        self.size += sign * item.size
        self.cost = self.cost + sign * item.cost if self._length else 0.0
