"""Pace of rejections for a missing or invalid token.

A caller without a token may repeat its call as soon as it is rejected, and each rejection takes
time of the event loop. Above a rate that no mistake causes, rejections wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable

AT_ONCE = 50
"""Rejections per second, of all callers together, that do not wait."""
DELAY_S = 0.25
"""Delay of the others."""


class RejectionPace:
    """Counter of the rejections of each second.

    Args:
        clock: returns seconds; monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._since, self._count = clock, 0.0, 0

    def delay_s(self) -> float:
        """Count one rejection; return the seconds by which it is delayed."""
        now = self._clock()
        if now - self._since >= 1:
            self._since, self._count = now, 0
        self._count += 1
        return DELAY_S if self._count > AT_ONCE else 0.0
