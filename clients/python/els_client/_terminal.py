"""Output of the commands: progress, reports and tables."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.status import Status
from rich.table import Column, Table

from els_client._models import Model, RepositoryModel, Statistics

_MODEL_COLUMNS = (
    *("name", "machine", "padding", "image", "labels", "window", "bank", "step", "20 steps"),
)
_NUMBERS = ("step", "20 steps")
_LEAST_NEEDED = ("padding", "window", "bank", "20 steps", "labels", "machine")
"""Columns that a narrow terminal does without, in this order."""
_UNBOUNDED = 1000


def waiting(text: str) -> Status:
    """Return a spinner on stderr, silent unless that is a terminal."""
    return Console(stderr=True).status(text)


def progress(*, share: bool = False) -> Progress:
    """Return a progress bar on stderr, silent unless that is a terminal.

    Args:
        share: Whether it shows the share that is done, and no numbers.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn() if share else MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


def report(
    as_json: bool, began: float, out: Path, gif: Path | None = None, **facts: object
) -> None:
    """Print the written files and the time since ``began`` (``time.perf_counter``)."""
    seconds = round(time.perf_counter() - began, 3)
    paths = {name: str(path) for name, path in (("out", out), ("gif", gif)) if path}
    if as_json:
        typer.echo(json.dumps({**paths, **facts, "seconds": seconds}))
    else:
        typer.echo(f"wrote {' and '.join(paths.values())} in {seconds:.1f} s")


def list_models(models: Sequence[Model], as_json: bool) -> None:
    """Print every model: as JSON with all fields, otherwise as a table."""
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(model) for model in models]))
        return
    rows = [_facts(model) for model in models]
    console = Console()
    if not console.is_terminal:
        # A pipe has no width; what reads it gets every column.
        console = Console(width=_UNBOUNDED)
    left_out: list[str] = []
    table = _table(rows, left_out)
    for column in _LEAST_NEEDED:
        if _width(console, table) <= console.width:
            break
        left_out.append(column)
        table = _table(rows, left_out)
    console.print(table)
    if left_out:
        hint = (
            f"columns omitted for lack of width: {', '.join(left_out)}; els models --json has all"
        )
        typer.echo(hint, err=True)


def _facts(model: Model) -> dict[str, str]:
    """Return the row of a model, by the name of the column."""
    window = model.window
    return {
        "name": model.name,
        "machine": model.machine or model.kind,
        "padding": model.padding or "–",
        "image": "×".join(map(str, model.shape)),
        "labels": str(model.label_count or "–"),
        "window": f"{min(window.k)}–{max(window.k)}" if window and window.k else "–",
        "bank": str(model.bank.images) if model.bank else "–",
        "step": _duration(model.step_seconds),
        "20 steps": _duration(20 * model.step_seconds),
    }


def _table(rows: Sequence[dict[str, str]], left_out: Sequence[str]) -> Table:
    names = [name for name in _MODEL_COLUMNS if name not in left_out]
    columns = [
        Column(name, no_wrap=True, justify="right" if name in _NUMBERS else "left")
        for name in names
    ]
    table = Table(*columns, box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(*(row[name] for name in names))
    return table


def _width(console: Console, table: Table) -> int:
    """Return the width of a table without wrapping."""
    return Measurement.get(console, console.options.update(width=_UNBOUNDED), table).maximum


def _duration(seconds: float) -> str:
    """Return a predicted duration with two digits and a unit, or ``< 1 ms``; 0 is unknown."""
    if not seconds:
        return "–"
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}"
    if seconds >= 0.1:
        return f"{seconds:.2g} s"
    return f"{1e3 * seconds:.2g} ms" if seconds >= 1e-3 else "< 1 ms"


def list_repository(
    models: Sequence[RepositoryModel], rows: Sequence[Statistics], as_json: bool
) -> None:
    """Print every model of a repository with its statistics."""
    statistics = {(one.name, one.version): one for one in rows}
    pairs = [(model, statistics.get((model.name, model.version))) for model in models]
    if as_json:
        documents = (
            dataclasses.asdict(model) | {"statistics": one and dataclasses.asdict(one)}
            for model, one in pairs
        )
        typer.echo(json.dumps(list(documents)))
        return
    counts = (Column(name, justify="right") for name in ("answered", "failed", "computed s"))
    names = (Column(name, no_wrap=True) for name in ("name", "version", "state"))
    table = Table(*names, *counts, "reason", box=SIMPLE_HEAD)
    for model, one in pairs:
        numbers = (one.answered, one.failed, round(one.computed_s, 1)) if one else ("–",) * 3
        table.add_row(model.name, model.version, model.state, *map(str, numbers), model.reason)
    Console().print(table)
