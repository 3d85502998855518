"""Progress of commands on stderr: a bar on a terminal, otherwise a line every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress as RichProgress

_EVERY_S = 5.0
_WIDTH = 12


@contextmanager
def progress_of(
    title: str, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback for the number of items done and the total.

    Args:
        title: name of the work.
        clock: monotonic time in seconds.
    """
    if not sys.stderr.isatty():
        yield _Lines(title, clock)
        return
    with RichProgress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"{escape(title)} …", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    """Prints a line every few seconds, and none for quick work."""

    def __init__(self, title: str, clock: Callable[[], float]) -> None:
        self._title, self._clock, self._printed = title, clock, clock()

    def __call__(self, done: int, total: int) -> None:
        if (now := self._clock()) - self._printed >= _EVERY_S:
            self._printed = now
            typer.echo(f"{self._title}: {done} of {total} images", err=True)


class Progress:
    """Progress of a long run on stderr: a bar on a terminal, otherwise a line now and then.

    Args:
        title: name of the work.
        every_s: seconds between two lines if stderr is not a terminal.
    """

    def __init__(self, title: str, every_s: float = 10.0) -> None:
        self._title, self._every_s = title, every_s
        self._begin, self._shown, self._first = time.monotonic(), -every_s, -1
        self._terminal = sys.stderr.isatty()

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Show that ``done`` of ``total`` steps are complete, with a note."""
        now = time.monotonic()
        if self._first < 0:
            # Steps of an earlier run do not count for the speed of this one.
            self._first, self._begin = done, now
        if not self._terminal and done < total and now - self._shown < self._every_s:
            return
        self._shown = now
        filled = _WIDTH * done // total
        bar = "█" * filled + "·" * (_WIDTH - filled)
        text = f"{self._title:<12} {bar} {100 * done // total:3d} %  {note}"
        text = f"{text}  {self._left(done, total, now)}"
        end = "\r" if self._terminal and done < total else "\n"
        print(f"{text:<78}", end=end, file=sys.stderr, flush=True)

    def _left(self, done: int, total: int, now: float) -> str:
        if done <= self._first or done == total:
            return ""
        return f"{(now - self._begin) / (done - self._first) * (total - done) / 60:.1f} min left"
