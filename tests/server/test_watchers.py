"""Bounds of watchers, over many random comings and goings."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from els_service.errors import ResourceExhaustedError
from els_service.server.services.health_watchers import Watcher, Watchers

MOST, MOST_OF_PEER, PEERS = 12, 5, 8


@pytest.mark.parametrize("seed", range(20))
def test_bounds_hold_and_a_connection_below_its_share_is_admitted(seed: int) -> None:
    rng = random.Random(seed)
    watchers, held = Watchers(MOST, MOST_OF_PEER), list[Watcher]()
    for _ in range(2000):
        action = rng.random()
        if action < 0.6:
            peer = str(rng.randrange(PEERS))
            of_peer = Counter(one.peer for one in held)
            live = Counter(one.peer for one in held if not one.dropped)
            try:
                held.append(watchers.admit(str(rng.randrange(3)), peer))
            except ResourceExhaustedError:
                crowded = live.total() == MOST and max(live.values()) < live[peer] + 2
                assert of_peer[peer] == MOST_OF_PEER or crowded
        elif held and action < 0.85:
            watchers.end(held.pop(rng.randrange(len(held))))
        elif live_ones := [one for one in held if not one.dropped]:
            watchers.drop(rng.choice(live_ones), "took no answer")
        assert watchers.live == sum(not one.dropped for one in held) <= MOST
        assert watchers.stalled == sum(bool(one.dropped) for one in held)
        assert max(Counter(one.peer for one in held).values(), default=0) <= MOST_OF_PEER
    for one in held:
        watchers.end(one)
    assert (watchers.live, watchers.stalled) == (0, 0)


def test_a_status_wakes_those_that_watch_it_and_are_not_dropped() -> None:
    watchers = Watchers(MOST, MOST_OF_PEER)
    first, second, other = (watchers.admit(name, "peer") for name in ("a", "a", "b"))
    watchers.drop(second, "took no answer")
    second.woken.clear()
    watchers.wake("a")
    watchers.wake("nobody")
    assert [one.woken.is_set() for one in (first, second, other)] == [True, False, False]


def test_dropped_watchers_keep_others_out_of_their_connection_and_of_no_other() -> None:
    watchers = Watchers(2, 2)
    for _ in range(2):
        watchers.drop(watchers.admit("a", "stalled"), "took no answer")
    with pytest.raises(ResourceExhaustedError, match="at most 2 on one connection, got one more"):
        watchers.admit("a", "stalled")
    watchers.admit("a", "one")
    watchers.admit("a", "another")
    with pytest.raises(ResourceExhaustedError, match="at most 2 on all connections, got one more"):
        watchers.admit("a", "third")
