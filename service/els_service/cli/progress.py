"""Progress of commands on stderr: a bar on a terminal, otherwise a line every few seconds."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from types import TracebackType

_WIDTH = 12


class Progress:
    """Progress of a long run; as a context manager it ends an unfinished bar with a newline.

    Args:
        title: name of the work.
        every_s: seconds between two lines if stderr is not a terminal.
        quiet_s: seconds before the first line if stderr is not a terminal; shorter work prints
            nothing.
        clock: monotonic time in seconds.
    """

    def __init__(
        self,
        title: str,
        *,
        every_s: float = 10.0,
        quiet_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title, self._every_s, self._clock = title, every_s, clock
        self._first_at = clock()
        self._first: int | None = None
        self._next = self._quiet_until = self._first_at + quiet_s
        self._terminal = sys.stderr.isatty()
        self._unfinished = False

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Show that ``done`` of ``total`` steps are complete, with a note."""
        now = self._clock()
        if self._first is None:
            # Steps of an earlier run do not count for the speed of this one.
            self._first, self._first_at = done, now
        due = now >= self._next or (done == total and now >= self._quiet_until)
        if not (self._terminal or due):
            return
        self._next = now + self._every_s
        filled = _WIDTH * done // total
        bar = "█" * filled + "·" * (_WIDTH - filled)
        text = f"{self._title:<12} {bar} {100 * done // total:3d}%  {note}"
        text = f"{text}  {self._left(done, total, now)}"
        self._unfinished = self._terminal and done < total
        end = "\r" if self._unfinished else "\n"
        # A wrapped line could not be overwritten.
        width = shutil.get_terminal_size().columns - 1 if self._terminal else None
        print(f"{text:<78}"[:width], end=end, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._unfinished:
            print(file=sys.stderr)

    def _left(self, done: int, total: int, now: float) -> str:
        if self._first is None or done <= self._first or done == total:
            return ""
        return f"{(now - self._first_at) / (done - self._first) * (total - done) / 60:.1f} min left"
