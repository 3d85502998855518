"""Budgets with their error texts, and what one request reserves of several."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from els_service.engine.budget import Budget, Holding
from els_service.errors import QueueFullError

T = TypeVar("T")

_LEAST_RETRY_S = 0.05
_RETRY_S = 1.0
"""After which bytes may be free again: nobody knows how long their holders take."""


@dataclass(frozen=True, eq=False)
class NamedBudget:
    """Budget that requests hold parts of while they wait.

    Args:
        budget: the capacity and its holders.
        name: such as ``the queue of digits``.
        seconds: whether its unit is predicted seconds of work; else it is bytes.
    """

    budget: Budget
    name: str
    seconds: bool

    def up_to(self, amount: float) -> float:
        """Return the amount, or what is free if that is less: a request alone may exceed it."""
        return min(amount, max(self.budget.capacity - self.budget.used, 0.0))

    def full(self, caller: str, amount: float) -> QueueFullError:
        """Return the error of a request for which there is no room."""
        budget = self.budget
        text = (
            f"{self.name} is full: {self._told(budget.used)} are held, "
            f"{self._told(budget.held_by(caller))} by this caller; "
            f"{self._told(budget.capacity)} are allowed"
        )
        return self._error(text, budget.used + amount - budget.capacity)

    def gave_way(self, caller: str, amount: float) -> QueueFullError:
        """Return the error of a request whose holding of ``amount`` was evicted."""
        budget = self.budget
        held = budget.held_by(caller) + amount
        text = (
            f"gave way in {self.name}: its caller held {self._told(held)} of the "
            f"{self._told(budget.capacity)} allowed, and others need room"
        )
        # Who needs the room may hold nothing yet: with the evicted caller there are two at least.
        return self._error(text, held - budget.capacity / max(budget.callers, 2))

    def _told(self, amount: float) -> str:
        return f"{amount:.3g} s" if self.seconds else f"{amount:.0f} bytes"

    def _error(self, text: str, excess: float) -> QueueFullError:
        retry_after_s = max(_LEAST_RETRY_S, excess) if self.seconds else _RETRY_S
        return QueueFullError(text, retry_after_s=retry_after_s)


class Reservation:
    """What one request holds of several rooms: all of it or nothing.

    Args:
        caller: whose request it is.
        gave_way: called if a part is evicted, when all is released that is not pinned.
    """

    __slots__ = ("_gave_way", "_held", "caller")

    def __init__(self, caller: str, gave_way: Callable[[QueueFullError], None]) -> None:
        self.caller, self._gave_way = caller, gave_way
        self._held: list[tuple[NamedBudget, Holding]] = []

    def reserve(self, parts: Sequence[tuple[NamedBudget, float]]) -> None:
        """Hold an amount of each room, beside what is held already.

        Raises:
            QueueFullError: One of them has no room; nothing more is held, nobody was evicted.
        """
        for room, amount in parts:
            if not room.budget.fits(self.caller, amount):
                raise room.full(self.caller, amount)
        for room, amount in parts:
            # What the parts before evicted holds less everywhere: it still fits.
            holding = room.budget.reserve(self.caller, amount, partial(self._evicted, room))
            assert holding is not None
            self._held.append((room, holding))

    def begin(self, queue: Sequence[NamedBudget], share: float) -> None:
        """Keep a share, 0 to 1, of what is held of a queue's rooms; pin what is held of others.

        For a request of which a part ceases to wait and is computed.
        """
        for room, holding in self._held:
            if room in queue:
                room.budget.resize(holding, min(share, 1.0) * holding.amount)
            else:
                room.budget.pin(holding)
        if not share:
            self.release(*queue)

    def release(self, *rooms: NamedBudget) -> None:
        """Release what is held of some rooms; of all where none is named. Twice is no matter."""
        kept = []
        for room, holding in self._held:
            if rooms and room not in rooms:
                kept.append((room, holding))
            else:
                room.budget.release(holding)
        # A holding knows its request: together they would stay until garbage is collected.
        self._held = kept

    def _evicted(self, room: NamedBudget) -> None:
        amount = sum(holding.amount for other, holding in self._held if other is room)
        error = room.gave_way(self.caller, amount)
        # What is pinned is in use; it is released when that ends.
        self.release(*(other for other, holding in self._held if holding.evict is not None))
        self._gave_way(error)


class TrajectoryReservation:
    """A trajectory, or a query whose model is being loaded, which ends if it has to give way.

    Args:
        caller: whose it is.
        gave_way: called once when it has to.
    """

    def __init__(self, caller: str, gave_way: Callable[[], None]) -> None:
        self.reservation = Reservation(caller, self._end)
        self._gave_way = gave_way
        self._reason: tuple[str, float] | None = None
        """Why it ended, and when to come again. An error would know the frames that raised it, and
        they this: all would stay until garbage is collected."""
        self._awaited: asyncio.Future[Any] | None = None

    async def until(self, future: asyncio.Future[T]) -> T:
        """Return the result of a future, which fails if the stay ends before it is done.

        Raises:
            QueueFullError: It ended.
        """
        self._awaited = future
        try:
            return await future
        finally:
            self._awaited = None

    def ending(self) -> asyncio.Future[None]:
        """Return a future that fails if the stay ends; to be cancelled."""
        self._awaited = asyncio.get_running_loop().create_future()
        return self._awaited

    def check(self) -> None:
        """Raise QueueFullError if it has ended."""
        if self._reason is not None:
            raise self._error()

    def _end(self, error: QueueFullError) -> None:
        assert error.retry_after_s is not None
        self._reason = str(error), error.retry_after_s
        self._gave_way()
        if self._awaited is not None and not self._awaited.done():
            self._awaited.set_exception(self._error())

    def _error(self) -> QueueFullError:
        assert self._reason is not None
        text, retry_after_s = self._reason
        return QueueFullError(text, retry_after_s=retry_after_s)
