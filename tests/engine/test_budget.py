from __future__ import annotations

import math
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from els_service.engine.budget import Budget, Holding

CAPACITY = 100.0


def test_a_caller_alone_may_hold_everything() -> None:
    budget = Budget(CAPACITY)
    assert all(budget.reserve("a", 10) for _ in range(10))
    assert budget.reserve("a", 1) is None
    assert budget.used == CAPACITY


def test_what_is_alone_may_exceed_the_capacity() -> None:
    budget = Budget(CAPACITY)
    holding = budget.reserve("a", 250)
    assert holding
    assert budget.reserve("b", 1) is None
    assert budget.resize(holding, 300)
    budget.release(holding)
    assert budget.used == 0
    assert budget.reserve("b", 1)


def test_a_full_budget_makes_room_for_a_newcomer_by_the_newest_of_the_largest_holder() -> None:
    budget, evicted = Budget(CAPACITY), list[int]()
    for i in range(7):
        budget.reserve("large", 10, partial(evicted.append, i))
    for i in range(3):
        budget.reserve("small", 10, partial(evicted.append, 100 + i))
    assert budget.reserve("newcomer", 20)
    assert evicted == [6, 5]
    assert (budget.held_by("large"), budget.held_by("small")) == (50, 30)


def test_a_caller_who_would_hold_most_is_rejected_and_nothing_is_evicted() -> None:
    budget = Budget(CAPACITY)
    for caller in ("a", "b"):
        for _ in range(5):
            assert budget.reserve(caller, 10, lambda: pytest.fail("evicted"))
    assert budget.reserve("a", 10) is None
    assert budget.reserve("c", 60) is None


def test_what_cannot_be_evicted_stays() -> None:
    budget = Budget(CAPACITY)
    assert budget.reserve("a", 90)
    assert budget.reserve("a", 10, lambda: None)
    assert budget.reserve("b", 20) is None
    assert budget.reserve("b", 10)
    assert budget.held_by("a") == 90


def test_a_holding_grows_at_the_cost_of_larger_holders_only() -> None:
    budget = Budget(CAPACITY)
    small = budget.reserve("small", 1, lambda: pytest.fail("evicted"))
    assert small
    for _ in range(9):
        budget.reserve("large", 11, lambda: None)
    assert budget.resize(small, 40)
    assert budget.held_by("large") == 55
    assert not budget.resize(small, 70)
    assert small.amount == 40


def test_releasing_twice_or_after_eviction_changes_nothing() -> None:
    budget = Budget(CAPACITY)
    first = budget.reserve("a", 100, lambda: None)
    assert first
    second = budget.reserve("b", 50)
    assert second
    budget.release(first)
    budget.release(second)
    budget.release(second)
    assert not budget.resize(second, 1)
    assert budget.used == 0


STEPS = st.lists(
    st.tuples(
        st.sampled_from("abcd"),
        st.floats(0.1, 40),
        st.sampled_from(["reserve", "fixed", "release", "resize"]),
    ),
    max_size=80,
)


@given(STEPS)
def test_no_caller_within_its_share_is_rejected_and_the_capacity_holds(
    steps: list[tuple[str, float, str]],
) -> None:
    budget = Budget(CAPACITY)
    live: dict[int, Holding] = {}
    fixed = 0.0
    for number, (caller, amount, step) in enumerate(steps):
        others = {holding.caller for holding in live.values()} - {caller}
        share = CAPACITY / (len(others) + 1)
        if step == "release" and live:
            budget.release(live.pop(min(live)))
            continue
        if step == "resize" and live:
            key = min(live)
            before = live[key].amount
            done = budget.resize(live[key], amount)
            assert done or live[key].amount == before
        else:
            before = budget.held_by(caller)
            evict = None if step == "fixed" else partial(live.__delitem__, number)
            holding = budget.reserve(caller, amount, evict)
            if holding:
                live[number] = holding
                fixed += amount if step == "fixed" else 0
            elif not fixed:
                # Only what cannot be evicted may stand in the way of a caller within its share.
                assert before + amount > share - 1e-6
        total = math.fsum(holding.amount for holding in live.values())
        assert budget.used == pytest.approx(total)
        assert budget.used <= CAPACITY + 1e-6 or len(live) == 1
        for name in "abcd":
            own = math.fsum(h.amount for h in live.values() if h.caller == name)
            assert budget.held_by(name) == pytest.approx(own, abs=1e-6)
