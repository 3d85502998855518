"""Budget shared by callers: unrestricted while it suffices, divided evenly once it is scarce.

Pure bookkeeping: no clock, no event loop. When a request does not fit, the newest holdings of the
caller that holds most are evicted, as long as that caller holds more than the requester would
("longest queue drop", Suter et al. 1999). So a caller within its share, which is the capacity
divided by the number of callers, is never rejected because others exceed theirs, and the capacity
is never exceeded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

_LEAST = 1e-9
"""Smaller differences are rounding errors of sums."""


class Holding:
    """Part of a budget that one caller holds until it is released.

    Args:
        caller: its holder.
        amount: amount in the unit of the budget.
        evict: called once if the holding is evicted, after its release; None if it is pinned.
    """

    __slots__ = ("amount", "caller", "evict")

    def __init__(self, caller: str, amount: float, evict: Callable[[], None] | None) -> None:
        self.caller, self.amount, self.evict = caller, amount, evict


@dataclass(slots=True)
class _Account:
    """Holdings of one caller."""

    total: float = 0.0
    evictable: float = 0.0
    holdings: dict[Holding, None] = field(default_factory=dict)
    """In the order of their reservation."""


class Budget:
    """Capacity and its holders.

    Args:
        capacity: capacity in any unit; a holding that is alone may exceed it.
    """

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self.used = 0.0
        self.evicted = 0
        """Number of holdings evicted so far."""
        self._accounts: dict[str, _Account] = {}

    @property
    def callers(self) -> int:
        """Number of callers that hold something."""
        return len(self._accounts)

    def held_by(self, caller: str) -> float:
        """Return the amount that a caller holds."""
        account = self._accounts.get(caller)
        return account.total if account else 0.0

    def fits(self, caller: str, amount: float) -> bool:
        """Return whether ``reserve`` would succeed, if need be by evictions."""
        return self.used == 0 or self._could_fit(caller, amount)

    def reserve(
        self, caller: str, amount: float, evict: Callable[[], None] | None = None
    ) -> Holding | None:
        """Return a holding of ``amount``; None if it does not fit.

        Args:
            caller: its holder.
            amount: not negative.
            evict: see ``Holding``.
        """
        if not self.fits(caller, amount):
            return None
        self._evict_for(caller, amount)
        holding = Holding(caller, amount, evict)
        account = self._accounts.setdefault(caller, _Account())
        account.holdings[holding] = None
        self._add(account, holding, amount)
        return holding

    def resize(self, holding: Holding, amount: float) -> bool:
        """Change the amount of a holding; return False, without a change, if it does not fit.

        A holding that was evicted or released does not fit.
        """
        account = self._accounts.get(holding.caller)
        if account is None or holding not in account.holdings:
            return False
        change = amount - holding.amount
        alone = self.used - holding.amount < _LEAST
        if change > 0 and not alone:
            if not self._could_fit(holding.caller, change):
                return False
            self._evict_for(holding.caller, change)
        holding.amount = amount
        self._add(account, holding, change)
        return True

    def pin(self, holding: Holding) -> None:
        """Exempt a holding from eviction."""
        account = self._accounts.get(holding.caller)
        if account is not None and holding in account.holdings and holding.evict is not None:
            account.evictable -= holding.amount
            holding.evict = None

    def allow_eviction(self, holding: Holding, evict: Callable[[], None]) -> None:
        """Make a holding evictable; no effect after its release."""
        account = self._accounts.get(holding.caller)
        if account is not None and holding in account.holdings and holding.evict is None:
            account.evictable += holding.amount
            holding.evict = evict

    def release(self, holding: Holding) -> None:
        """Release a holding; no effect if it was evicted or released before."""
        account = self._accounts.get(holding.caller)
        if account is None or holding not in account.holdings:
            return
        del account.holdings[holding]
        self._add(account, holding, -holding.amount)
        # A method of the owner, which refers to the holding: a cycle for the garbage collector.
        holding.evict = None
        if not account.holdings:
            del self._accounts[holding.caller]
        if not self._accounts:
            self.used = 0.0  # rounding starts from zero again

    def _add(self, account: _Account, holding: Holding, change: float) -> None:
        self.used += change
        account.total += change
        if holding.evict is not None:
            account.evictable += change

    def _could_fit(self, caller: str, amount: float) -> bool:
        """Return whether ``amount`` more of a caller fits, if need be by evictions."""
        missing = self.used + amount - self.capacity
        if missing <= _LEAST:
            return True
        level = self.held_by(caller) + amount
        others = self._others(caller)
        spare = sum(min(each.evictable, max(each.total - level, 0.0)) for each in others)
        return spare >= missing - _LEAST

    def _evict_for(self, caller: str, amount: float) -> None:
        """Evict until ``amount`` more of a caller fits, which must be possible."""
        while self.used and self.used + amount - self.capacity > _LEAST:
            others = (each for each in self._others(caller) if each.evictable > _LEAST)
            self._evict_newest(max(others, key=_total))

    def _others(self, caller: str) -> list[_Account]:
        return [account for name, account in self._accounts.items() if name != caller]

    def _evict_newest(self, account: _Account) -> None:
        holding = next(each for each in reversed(account.holdings) if each.evict and each.amount)
        evict, self.evicted = holding.evict, self.evicted + 1
        self.release(holding)
        assert evict is not None
        evict()


def _total(account: _Account) -> float:
    return account.total
