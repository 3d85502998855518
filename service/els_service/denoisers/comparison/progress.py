"""A line on stderr that says how far a long run has come."""

from __future__ import annotations

import sys
import time

_WIDTH = 24
_QUIET_S = 10.0
"""Between two lines where they stay, as in a log."""


class Progress:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._begin, self._shown, self._first = time.monotonic(), -_QUIET_S, -1
        self._terminal = sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` is done."""
        now = time.monotonic()
        if self._first < 0:
            # What an earlier run did says nothing about this one's speed.
            self._first, self._begin = done, now
        if not self._terminal and done < total and now - self._shown < _QUIET_S:
            return
        self._shown = now
        filled = _WIDTH * done // total
        bar = "█" * filled + "·" * (_WIDTH - filled)
        text = f"{self._title:<12} {bar} {100 * done // total:3d} %  {self._left(done, total, now)}"
        end = "\r" if self._terminal and done < total else "\n"
        print(f"{text:<70}", end=end, file=sys.stderr, flush=True)

    def _left(self, done: int, total: int, now: float) -> str:
        if done <= self._first or done == total:
            return ""
        return f"{(now - self._begin) / (done - self._first) * (total - done) / 60:.1f} min left"
