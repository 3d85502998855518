"""What an engine tells of its work, to whoever measures it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Launch:
    """One batch that was computed; times are ``time.time_ns``'s."""

    model: str
    device: str
    started_ns: int
    ended_ns: int
    images: int
    cost: float
    """Predicted seconds."""
    members: tuple[object, ...]
    """What each submitter gave as its trace, or None."""
    queued_ns: tuple[int, ...]
    """When each member was queued."""


class Observer(Protocol):
    """Told of every item and batch, on the event loop; times in seconds."""

    def queued(self, model: str, seconds: float) -> None:
        """One item waited this long; not told of work that never queued."""
        ...

    def computed(self, model: str, seconds: float, images: int, cost: float) -> None:
        """One batch took this long; ``cost`` is what was predicted."""
        ...

    def dropped(self, model: str, reason: str) -> None:
        """One item has no answer, or one that nobody took."""
        ...

    def launched(self, launch: Launch) -> None:
        """One batch ended."""
        ...
