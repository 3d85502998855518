"""Named budgets, and reservations of one request in several of them."""

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
"""Retry delay for bytes; when their holders release them is unknown."""


@dataclass(frozen=True, eq=False)
class NamedBudget:
    """Budget with a name and a unit for errors.

    Args:
        budget: the capacity and its holders.
        name: such as ``the queue of digits``.
        seconds: whether the unit is predicted seconds of work; otherwise it is bytes.
    """

    budget: Budget
    name: str
    seconds: bool

    def up_to(self, amount: float) -> float:
        """Return the amount, limited to what is free; a request that is alone may exceed it."""
        return min(amount, max(self.budget.capacity - self.budget.used, 0.0))

    def full(self, caller: str, amount: float) -> QueueFullError:
        """Return the error of a request that does not fit."""
        budget = self.budget
        text = (
            f"{self.name} is full: {self._text(budget.used)} are held, "
            f"{self._text(budget.held_by(caller))} by this caller; "
            f"{self._text(budget.capacity)} are allowed"
        )
        return self._error(text, budget.used + amount - budget.capacity)

    def evicted(self, caller: str, amount: float) -> QueueFullError:
        """Return the error of a request whose holding of ``amount`` was evicted."""
        budget = self.budget
        held = budget.held_by(caller) + amount
        text = (
            f"evicted from {self.name}: its caller held {self._text(held)} of the "
            f"{self._text(budget.capacity)} allowed, and other callers need their share"
        )
        # The caller that needs the share may hold nothing yet, so there are at least two callers.
        return self._error(text, held - budget.capacity / max(budget.callers, 2))

    def _text(self, amount: float) -> str:
        return f"{amount:.3g} s" if self.seconds else f"{amount:.0f} bytes"

    def _error(self, text: str, excess: float) -> QueueFullError:
        retry_after_s = max(_LEAST_RETRY_S, excess) if self.seconds else _RETRY_S
        return QueueFullError(text, retry_after_s=retry_after_s)


class Reservation:
    """Parts of several budgets held by one request: all of them or none.

    Args:
        caller: caller of the request.
        on_evicted: called if a part is evicted, after all parts that are not pinned are released.
    """

    __slots__ = ("_held", "_on_evicted", "caller")

    def __init__(self, caller: str, on_evicted: Callable[[QueueFullError], None]) -> None:
        self.caller, self._on_evicted = caller, on_evicted
        self._held: list[tuple[NamedBudget, Holding]] = []

    def reserve(self, parts: Sequence[tuple[NamedBudget, float]]) -> None:
        """Reserve an amount of each budget, in addition to earlier reservations.

        Raises:
            QueueFullError: One of them is full; nothing was reserved or evicted.
        """
        for named, amount in parts:
            if not named.budget.fits(self.caller, amount):
                raise named.full(self.caller, amount)
        for named, amount in parts:
            # Evictions for the previous parts only lowered what is held, so this still fits.
            holding = named.budget.reserve(self.caller, amount, partial(self._evicted, named))
            assert holding is not None
            self._held.append((named, holding))

    def begin(self, queue: Sequence[NamedBudget], share: float) -> None:
        """Keep a share, 0 to 1, of what is held in the budgets of a queue, and pin the rest.

        Called when a part of the request leaves the queue to be computed.
        """
        for named, holding in self._held:
            if named in queue:
                named.budget.resize(holding, min(share, 1.0) * holding.amount)
            else:
                named.budget.pin(holding)
        if not share:
            self.release(*queue)

    def release(self, *budgets: NamedBudget) -> None:
        """Release what is held in some budgets, by default in all; idempotent."""
        kept = []
        for named, holding in self._held:
            if budgets and named not in budgets:
                kept.append((named, holding))
            else:
                named.budget.release(holding)
        # A holding refers to its request: the cycle would live until the garbage collection.
        self._held = kept

    def _evicted(self, named: NamedBudget) -> None:
        amount = sum(holding.amount for other, holding in self._held if other is named)
        error = named.evicted(self.caller, amount)
        # A pinned part is in use, and released by its user.
        self.release(*(other for other, holding in self._held if holding.evict is not None))
        self._on_evicted(error)


class TrajectoryReservation:
    """Reservation of a trajectory, or of a query whose model is being loaded.

    Args:
        caller: caller of the request.
        on_evicted: called once if the reservation is evicted.
    """

    def __init__(self, caller: str, on_evicted: Callable[[], None]) -> None:
        self.held = Reservation(caller, self._end)
        self._on_evicted = on_evicted
        self._reason: tuple[str, float] | None = None
        """Text and retry delay of its eviction; the error's traceback would make a cycle."""
        self._awaited: asyncio.Future[Any] | None = None

    async def until(self, future: asyncio.Future[T]) -> T:
        """Return the result of a future; an eviction fails the future.

        Raises:
            QueueFullError: The reservation was evicted.
        """
        self._awaited = future
        try:
            return await future
        finally:
            self._awaited = None

    def ending(self) -> asyncio.Future[None]:
        """Return a future that fails if the reservation is evicted; the caller cancels it."""
        self._awaited = asyncio.get_running_loop().create_future()
        return self._awaited

    def check(self) -> None:
        """Raise QueueFullError if the reservation was evicted."""
        if self._reason is not None:
            raise self._error()

    def _end(self, error: QueueFullError) -> None:
        assert error.retry_after_s is not None
        self._reason = str(error), error.retry_after_s
        self._on_evicted()
        if self._awaited is not None and not self._awaited.done():
            self._awaited.set_exception(self._error())

    def _error(self) -> QueueFullError:
        assert self._reason is not None
        text, retry_after_s = self._reason
        return QueueFullError(text, retry_after_s=retry_after_s)
