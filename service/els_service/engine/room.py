"""Room for what waits outside the queues: trajectories, and queries whose model is being loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from els_service.engine.terms import Observer
from els_service.errors import QueueFullError

_RETRY_S = 1.0


class Room:
    """Counts the bytes that are held.

    Args:
        most: of them; what is alone may hold more.
        observer: told of what is refused.
    """

    def __init__(self, most: int, observer: Observer) -> None:
        self._most, self._observer = most, observer
        self.held = 0
        """Bytes."""

    @contextmanager
    def taken(self, model: str, size: int) -> Iterator[None]:
        """Hold ``size`` bytes meanwhile.

        Raises:
            QueueFullError: There is no room.
        """
        if self.held and self.held + size > self._most:
            self._observer.dropped(model, "rejected_full")
            raise QueueFullError(
                f"trajectories, and callers whose models are being loaded, hold {self.held} bytes; "
                f"{self._most} are allowed",
                retry_after_s=_RETRY_S,
            )
        self.held += size
        try:
            yield
        finally:
            self.held -= size
