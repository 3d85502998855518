"""The generated part of docs/claim.md, from the newest record."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS
from benchmarks.reproduction.tables import claim, not_run

BEGIN = "<!-- begin of the part that `python -m benchmarks.reproduction --page` writes -->"
END = "<!-- end of the generated part -->"


def newest() -> Path:
    """Return the newest record of the claim."""
    return max(RESULTS.glob("????-??-??-claim.json"))


def figure_of(record: Path, network: str) -> Path:
    """Return the figure of a network beside a record."""
    return record.with_name(f"{record.stem}-{network}.png")


def generated(path: Path, page: Path) -> str:
    """Return the generated part of a page.

    Args:
        path: the record.
        page: whose links are relative to it.
    """
    record: dict[str, Any] = json.loads(path.read_bytes())
    rows = record["rows"]
    link = os.path.relpath(path, page.parent)
    head = f"From [{path.name}]({link}), commit {record['commit']}, on {_machine(record)}."
    parts = [head, claim(rows), not_run(rows), *_figures(path, page, rows)]
    return "\n\n".join(part for part in parts if part)


def _machine(record: dict[str, Any]) -> str:
    machine = record["machine"]
    return f"{machine['cores']} cores of an {machine['cpu']}, torch {machine.get('torch', '')}"


def _figures(path: Path, page: Path, rows: list[dict[str, Any]]) -> Iterator[str]:
    shown: dict[str, Path] = {}
    for ours in (ours for row in rows for ours in row["ours"]):
        source = path.with_name(ours.get("record", path.name))
        if (file := figure_of(source, ours["network"])).exists():
            shown.setdefault(ours["network"], file)
    if shown:
        yield "## Figures\n\nThe noise, what the network draws, and what machines draw from it."
    for name, file in shown.items():
        link = os.path.relpath(file, page.parent)
        alt = f"Rows of images: noise, the network {name}, and machines."
        yield f'`{name}`:\n\n<img src="{link}" width="680" alt="{alt}">'


def write_page(path: Path, page: Path) -> None:
    """Replace the generated part of a page.

    Raises:
        ValueError: The page has no such part.
    """
    before, after = parts_of(page)
    page.write_text(f"{before}{BEGIN}\n\n{generated(path, page)}\n\n{END}{after}")


def parts_of(page: Path) -> tuple[str, str]:
    """Return the text before and after the generated part.

    Raises:
        ValueError: The page has no such part.
    """
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{page}: expected one part from {BEGIN} to {END}")
    before, rest = text.split(BEGIN)
    return before, rest.split(END)[1]
