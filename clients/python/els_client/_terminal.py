"""What the commands share: a client whose failures become exit codes, progress and reports."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.status import Status
from rich.table import Column, Table

from els_client._client import Client
from els_client._types import Model
from els_client.errors import (
    DeadlineExceededError,
    ElsError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)

EXIT_CODES_HELP = (
    "Exit codes: 0 done · 2 wrong usage or argument · 3 no such model · 4 no server answers"
    " · 5 deadline exceeded · 6 over a limit · 1 any other failure."
)
_EXIT_CODES: dict[type[Exception], int] = {
    InvalidArgumentError: 2,
    NotFoundError: 3,
    UnavailableError: 4,
    DeadlineExceededError: 5,
    ResourceExhaustedError: 6,
}


@contextmanager
def connected(target: str, timeout_s: float | None) -> Iterator[Client]:
    """Yield a client; a failure inside becomes one line on stderr and an exit code."""
    try:
        with Client(target, timeout_s=timeout_s) as client:
            yield client
    except (ElsError, OSError) as error:
        typer.echo(f"els: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(_EXIT_CODES.get(type(error), 1)) from None


def waiting(text: str) -> Status:
    """Return a spinner on stderr, silent where that is no terminal."""
    return Console(stderr=True).status(text)


def progress() -> Progress:
    """Return a bar of steps on stderr, silent where that is no terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


def report(
    as_json: bool, began: float, out: Path, gif: Path | None = None, **facts: object
) -> None:
    """Print what was written and how long it took since ``began`` (``time.perf_counter``)."""
    seconds = round(time.perf_counter() - began, 3)
    paths = {name: str(path) for name, path in (("out", out), ("gif", gif)) if path}
    if as_json:
        typer.echo(json.dumps({**paths, **facts, "seconds": seconds}))
    else:
        typer.echo(f"wrote {' and '.join(paths.values())} in {seconds:.1f} s")


def list_models(models: Sequence[Model], as_json: bool) -> None:
    """Print every model: all that is known as JSON, else a table of what tells them apart."""
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(model) for model in models]))
        return
    name = Column("name", no_wrap=True)
    table = Table(name, "machine", "padding", "image", "labels", "window", "bank", box=SIMPLE_HEAD)
    for model in models:
        window = model.window
        table.add_row(
            model.name,
            model.machine or model.kind,
            model.padding or "–",
            "×".join(map(str, model.shape)),
            str(model.label_count or "–"),
            f"{min(window.k)}–{max(window.k)}" if window and window.k else "–",
            str(model.bank.images) if model.bank else "–",
        )
    Console().print(table)
