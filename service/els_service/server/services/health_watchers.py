"""Registry of the calls that watch health at one port, with their bounds.

A watcher is *held* from its admission to the end of its call, and *live* until it is dropped. A
connection is bounded in what it holds, as a dropped call costs memory until the peer takes the
answer that is on its way or the connection ends. The port is bounded in what is live, so that
watchers who take no answers keep nobody out.
"""

from __future__ import annotations

import asyncio
from collections import Counter

from els_service.errors import ResourceExhaustedError

_CROWDED = "watchers: others need the room; watch again later"


class Watcher:
    """One call that watches one service.

    Args:
        service: what it watches; need not be known.
        peer: its connection.
    """

    __slots__ = ("dropped", "peer", "service", "woken")

    def __init__(self, service: str, peer: str) -> None:
        self.service, self.peer = service, peer
        self.woken = asyncio.Event()
        """Set when its status may have changed, or it was dropped."""
        self.dropped = ""
        """Why, if it was; the text is for the caller."""


class Watchers:
    """The watchers at one port; every method returns at once.

    Args:
        most: live watchers at the port, at least 1.
        most_of_peer: held watchers of one connection, at least 1.
    """

    def __init__(self, most: int, most_of_peer: int) -> None:
        self._most, self._most_of_peer = most, most_of_peer
        self._held: Counter[str] = Counter()
        self._live: dict[str, dict[Watcher, None]] = {}
        """By peer, the oldest first."""
        self._of_service: dict[str, dict[Watcher, None]] = {}
        """The live ones by what they watch."""
        self._live_count = self._held_count = 0

    @property
    def live(self) -> int:
        """Watchers that are told what changes."""
        return self._live_count

    @property
    def stalled(self) -> int:
        """Watchers that were dropped and whose calls have not ended yet."""
        return self._held_count - self._live_count

    def admit(self, service: str, peer: str) -> Watcher:
        """Return a new watcher; at a full port it replaces one of the connection with most.

        Raises:
            ResourceExhaustedError: The connection holds as many as it may, or the port is full and
                no connection has at least two live watchers more than this one.
        """
        if self._held[peer] >= self._most_of_peer:
            most = f"at most {self._most_of_peer} on one connection"
            raise ResourceExhaustedError("watchers", most, "one more")
        if self._live_count >= self._most:
            self._make_room(peer)
        watcher = Watcher(service, peer)
        self._held[peer] += 1
        self._held_count += 1
        self._live_count += 1
        self._live.setdefault(peer, {})[watcher] = None
        self._of_service.setdefault(service, {})[watcher] = None
        return watcher

    def wake(self, service: str) -> None:
        """Let the watchers of a service look at its status."""
        for watcher in self._of_service.get(service, ()):
            watcher.woken.set()

    def drop(self, watcher: Watcher, reason: str) -> None:
        """Take a live watcher out, and let its call end for this reason as soon as it can."""
        self._remove(watcher)
        watcher.dropped = reason
        watcher.woken.set()

    def end(self, watcher: Watcher) -> None:
        """Forget a watcher whose call is over."""
        if not watcher.dropped:
            self._remove(watcher)
        self._held_count -= 1
        self._held[watcher.peer] -= 1
        if not self._held[watcher.peer]:
            del self._held[watcher.peer]

    def _make_room(self, peer: str) -> None:
        crowd = max(self._live.values(), key=len)
        # One more would be no fairer than before, and two connections could go on like that.
        if len(crowd) < len(self._live.get(peer, ())) + 2:
            most = f"at most {self._most} on all connections"
            raise ResourceExhaustedError("watchers", most, "one more")
        self.drop(next(reversed(crowd)), _CROWDED)

    def _remove(self, watcher: Watcher) -> None:
        self._live_count -= 1
        for found, key in ((self._live, watcher.peer), (self._of_service, watcher.service)):
            del found[key][watcher]
            if not found[key]:
                del found[key]
