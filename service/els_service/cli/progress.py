"""Progress of commands on stderr: a bar on a terminal, otherwise a line every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """Progress of a long run; a context manager, which ends an unfinished bar.

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
        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Show that ``done`` of ``total`` steps are complete, with a note."""
        if self._bar.console.is_terminal:
            self._draw(done, total, note)
            return
        now = self._clock()
        if self._first is None:
            # Steps of an earlier run do not count for the speed of this one.
            self._first, self._first_at = done, now
        if now >= self._next or (done == total and now >= self._quiet_until):
            self._next = now + self._every_s
            text = f"{self._title:<12} {100 * done // total:3d}%  {note}"
            print(f"{text}  {self._left(done, total, now)}".rstrip(), file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar.live.is_started:  # otherwise rich prints an empty line
            self._bar.stop()

    def _draw(self, done: int, total: int, note: str) -> None:
        if not self._bar.tasks:
            self._bar.add_task(self._title, completed=done, total=total, note=note)
            self._bar.start()
        (task,) = self._bar.task_ids
        self._bar.update(task, completed=done, total=total, note=note)
        if done >= total:
            self._bar.stop()

    def _left(self, done: int, total: int, now: float) -> str:
        if self._first is None or done <= self._first or done == total:
            return ""
        return f"{(now - self._first_at) / (done - self._first) * (total - done) / 60:.1f} min left"
