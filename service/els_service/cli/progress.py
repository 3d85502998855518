"""How far a command has come, on stderr: a bar on a terminal, elsewhere a line now and then."""

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
    """Yield what is told of the items done and of how many there are.

    Args:
        title: what is under way.
        clock: in seconds.
    """
    if not sys.stderr.isatty():
        yield _Lines(title, clock)
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"{escape(title)} …", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    """A line every few seconds, none for what is quick."""

    def __init__(self, title: str, clock: Callable[[], float]) -> None:
        self._title, self._clock, self._told = title, clock, clock()

    def __call__(self, done: int, total: int) -> None:
        if (now := self._clock()) - self._told >= _EVERY_S:
            self._told = now
            typer.echo(f"{self._title}: {done} of {total} images", err=True)
