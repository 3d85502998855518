"""Bounded registry of the health watch calls at one port.

A watcher is *held* from its admission to the end of its call, and *live* until it is dropped. Held
watchers are bounded per connection: a dropped call uses memory until the client reads the pending
response or disconnects. Live watchers are bounded per port, so that clients that do not read
responses do not exclude others.
"""

from __future__ import annotations

import asyncio
from collections import Counter

from els_service.errors import ResourceExhaustedError

_REPLACED = "watchers: replaced by a watcher of another connection; retry later"


class Watcher:
    """One call that watches one service.

    Args:
        service: may be unknown.
        peer: of its connection.
    """

    __slots__ = ("dropped", "peer", "service", "woken")

    def __init__(self, service: str, peer: str) -> None:
        self.service, self.peer = service, peer
        self.woken = asyncio.Event()
        """Set when the status may have changed or the watcher was dropped."""
        self.dropped = ""
        """Reason for the client; empty unless dropped."""


class Watchers:
    """Watchers at one port; no method blocks.

    Args:
        most: maximum live watchers at the port, at least 1.
        most_of_peer: maximum held watchers of one connection, at least 1.
    """

    def __init__(self, most: int, most_of_peer: int) -> None:
        self._most, self._most_of_peer = most, most_of_peer
        self._held: Counter[str] = Counter()
        self._live: dict[str, dict[Watcher, None]] = {}
        """By peer, oldest first."""
        self._of_service: dict[str, dict[Watcher, None]] = {}
        """Live watchers by service."""
        self._live_count = self._held_count = 0

    @property
    def live(self) -> int:
        """Number of watchers that receive changes."""
        return self._live_count

    @property
    def stalled(self) -> int:
        """Number of dropped watchers whose calls have not ended."""
        return self._held_count - self._live_count

    def admit(self, service: str, peer: str) -> Watcher:
        """Return a new watcher; at a full port it replaces one of the connection with the most.

        Raises:
            ResourceExhaustedError: The connection holds its maximum, or the port is full and no
                connection has at least two live watchers more than this one.
        """
        if self._held[peer] >= self._most_of_peer:
            most = f"at most {self._most_of_peer} on one connection"
            raise ResourceExhaustedError("watchers", most, "one more")
        if self._live_count >= self._most:
            self._drop_for(peer)
        watcher = Watcher(service, peer)
        self._held[peer] += 1
        self._held_count += 1
        self._live_count += 1
        self._live.setdefault(peer, {})[watcher] = None
        self._of_service.setdefault(service, {})[watcher] = None
        return watcher

    def wake(self, service: str) -> None:
        """Wake the watchers of a service."""
        for watcher in self._of_service.get(service, ()):
            watcher.woken.set()

    def drop(self, watcher: Watcher, reason: str) -> None:
        """Remove a live watcher; its call ends with this reason as soon as it can."""
        self._remove(watcher)
        watcher.dropped = reason
        watcher.woken.set()

    def end(self, watcher: Watcher) -> None:
        """Remove a watcher whose call has ended."""
        if not watcher.dropped:
            self._remove(watcher)
        self._held_count -= 1
        self._held[watcher.peer] -= 1
        if not self._held[watcher.peer]:
            del self._held[watcher.peer]

    def _drop_for(self, peer: str) -> None:
        most_live = max(self._live.values(), key=len)
        # With a difference of one, two connections would replace each other for ever.
        if len(most_live) < len(self._live.get(peer, ())) + 2:
            most = f"at most {self._most} on all connections"
            raise ResourceExhaustedError("watchers", most, "one more")
        self.drop(next(reversed(most_live)), _REPLACED)

    def _remove(self, watcher: Watcher) -> None:
        self._live_count -= 1
        for found, key in ((self._live, watcher.peer), (self._of_service, watcher.service)):
            del found[key][watcher]
            if not found[key]:
                del found[key]
