"""Progress of a command on stderr: a bar on a terminal, otherwise a line every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

_EVERY_S = 5.0


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
    with Progress(console=Console(stderr=True), transient=True) as bar:
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
