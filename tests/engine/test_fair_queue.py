"""Order, shares and accounts of the queue."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from els_service.engine.fair_queue import FairQueue


@dataclass(eq=False)
class Piece:
    caller: str = ""
    cost: float = 1.0
    priority: int = 2
    size: int = 8
    waiting: bool = False


def filled(*pieces: Piece, starvation_s: float = 1e9) -> FairQueue[Piece]:
    queue: FairQueue[Piece] = FairQueue(3, starvation_s)
    for piece in pieces:
        queue.push(piece, 0.0)
    return queue


def order(queue: FairQueue[Piece], now: float = 0.0) -> list[Piece]:
    taken = []
    while (piece := queue.peek(now)) is not None:
        queue.take(piece, now)
        taken.append(piece)
    return taken


def test_one_callers_pieces_keep_their_order() -> None:
    pieces = [Piece(cost=cost) for cost in (5, 1, 3, 1)]
    assert order(filled(*pieces)) == pieces


def test_a_flood_waits_for_itself() -> None:
    flood = [Piece("flood") for _ in range(10)]
    modest = [Piece("modest") for _ in range(2)]
    taken = order(filled(*flood, *modest))
    assert [taken.index(piece) for piece in modest] == [1, 3]


def test_shares_are_of_cost_not_of_count() -> None:
    heavy = [Piece("heavy", cost=4) for _ in range(3)]
    light = [Piece("light", cost=1) for _ in range(12)]
    taken = order(filled(*heavy, *light))
    cost = {"heavy": 0.0, "light": 0.0}
    for piece in taken[:-3]:
        cost[piece.caller] += piece.cost
        assert abs(cost["heavy"] - cost["light"]) <= 4


def test_who_was_away_has_no_claim_on_the_past() -> None:
    queue = filled(*(Piece("a") for _ in range(100)))
    for _ in range(50):
        piece = queue.peek(0.0)
        assert piece is not None
        queue.take(piece, 0.0)
    late = [Piece("b") for _ in range(10)]
    for piece in late:
        queue.push(piece, 0.0)
    taken = order(queue)
    assert taken.index(late[-1]) >= 17


def test_higher_priorities_go_first() -> None:
    pieces = [Piece(priority=p) for p in (3, 1, 2, 1)]
    assert [piece.priority for piece in order(filled(*pieces))] == [1, 1, 2, 3]


def test_a_level_that_was_not_served_for_long_is_next() -> None:
    queue = filled(Piece(priority=1), Piece(priority=1), Piece(priority=3), starvation_s=2.0)
    assert queue.next_priority(1.9) == 1
    assert queue.next_priority(2.1) == 3
    assert [piece.priority for piece in order(queue, 2.1)] == [3, 1, 1]


def test_an_empty_queue_is_after_every_priority() -> None:
    assert filled().next_priority(0.0) == 4


def test_a_caller_who_leaves_is_not_charged() -> None:
    gone = [Piece("a", cost=100) for _ in range(5)]
    queue = filled(*gone, Piece("b"), Piece("b"))
    for piece in gone:
        queue.drop(piece)
    back = Piece("a")
    queue.push(back, 0.0)
    assert order(queue).index(back) <= 1


def test_a_flood_of_which_most_is_dropped_does_not_get_ahead() -> None:
    queue = filled(*(Piece("flood") for _ in range(50)))
    for _ in range(20):
        for _ in range(3):
            late = queue.peek(0.0)
            assert late is not None
            queue.drop(late)
            queue.push(Piece("flood"), 0.0)
        modest, served = Piece("modest"), []
        queue.push(modest, 0.0)
        while modest.waiting:
            head = queue.peek(0.0)
            assert head is not None
            queue.take(head, 0.0)
            queue.push(Piece("flood"), 0.0)
            served.append(head)
        assert len(served) <= 2


def test_what_is_ahead_counts_each_caller_up_to_ones_own() -> None:
    queue = filled(
        *(Piece("flood", cost=2) for _ in range(50)),
        Piece("small", cost=1),
        Piece("first", cost=7, priority=1),
        Piece("last", cost=7, priority=3),
    )
    assert queue.ahead_of("me", 2, 3.0) == 7 + 3 + 3 + 1
    assert queue.ahead_of("flood", 2, 3.0) == 7 + 103 + 1
    assert queue.ahead_of("me", 1, 3.0) == 3 + 3


Step = tuple[str, int, float, int]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["push", "push", "take", "drop"]),
            st.integers(0, 5),
            st.floats(0.001, 100),
            st.integers(1, 3),
        ),
        max_size=200,
    )
)
def test_the_accounts_agree_with_what_waits(steps: list[Step]) -> None:
    queue: FairQueue[Piece] = FairQueue(3, 5.0)
    waiting: list[Piece] = []
    for now, (act, number, cost, priority) in enumerate(steps):
        if act == "push":
            piece = Piece(str(number), cost, priority)
            queue.push(piece, now)
            waiting.append(piece)
        elif act == "take" and (head := queue.peek(now)) is not None:
            queue.take(head, now)
            waiting.remove(head)
        elif act == "drop" and waiting:
            queue.drop(waiting.pop(number % len(waiting)))
        assert len(queue) == len(waiting) == len(list(queue))
        assert queue.cost == pytest.approx(sum(piece.cost for piece in waiting))
        assert queue.size == 8 * len(waiting)
        assert set(queue) == set(waiting)
    assert {id(piece) for piece in order(queue)} == {id(piece) for piece in waiting}


def test_many_who_came_and_left_are_forgotten() -> None:
    queue = filled(Piece("stays", cost=1e9))
    for i in range(5000):
        piece = Piece(str(i))
        queue.push(piece, 0.0)
        queue.drop(piece)
    level = queue._levels[1]
    assert len(level.heap) < 200
    assert len(level.finish) < 2000
