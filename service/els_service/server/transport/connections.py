"""Estimate of the bytes that a connection has received of incomplete messages."""

from __future__ import annotations

LARGE_BYTES = 64 << 10
"""A complete message up to this size is not accounted for."""
_SLOW_S = 0.1
"""Lateness from which the bytes that may have arrived before the first scan are charged."""
_FRAME_BYTES, _FRAME_OVERHEAD, _CALL_OVERHEAD = 16 << 10, 9, 200
"""Size of an HTTP/2 frame, bytes of its header, and bytes of the headers of a call, estimated."""


class Connection:
    """Connection with a late message or a stream.

    Args:
        unseen: maximum bytes that a late message may have received before the first scan.
        now: on the monotonic clock.
    """

    __slots__ = ("_delivered_since", "_mark", "base", "delivered", "idle_since", "unseen")

    def __init__(self, unseen: int, now: float) -> None:
        self.base: int | None = None
        """Bytes received before the first byte of the late messages; None before the first scan."""
        self.delivered = 0
        """Bytes of messages completed since then."""
        self.unseen = unseen
        self._mark: int | None = None
        """Bytes received at the last but one scan at which no message was late."""
        self._delivered_since = 0
        self.idle_since = now

    def unfinished(self, received: int, late_s: float) -> int:
        """Return the bytes of incomplete messages.

        Args:
            received: by the connection since its start.
            late_s: age of the oldest late message in seconds.
        """
        if self.base is None:
            self.base = max(0, received - LARGE_BYTES)
            self.unseen = min(self.unseen, self.base)
        if self.unseen and late_s > _SLOW_S:
            self.base, self.unseen = self.base - self.unseen, 0
        unfinished = received - self.base - self.delivered
        if unfinished < 0:
            # Overheads are estimates: an excess must not become a credit.
            self.base += unfinished
        return max(0, unfinished)

    def deliver(self, size: int) -> None:
        """Count a message of ``size`` bytes as complete or abandoned."""
        frames = 1 + size // _FRAME_BYTES
        whole = size + frames * _FRAME_OVERHEAD + _CALL_OVERHEAD
        self.delivered += whole
        self._delivered_since += whole

    def settle(self, received: int | None) -> None:
        """Count everything received before the previous scan as delivered: no message is late."""
        self.base = received if self._mark is None else self._mark
        self.delivered, self.unseen = self._delivered_since, 0
        self._mark, self._delivered_since = received, 0
