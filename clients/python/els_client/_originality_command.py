"""Command ``els originality``: whether a picture was copied from a bank."""

from __future__ import annotations

import dataclasses
import json
import time as clock
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from els_client import _options as options
from els_client import _pictures as pictures
from els_client import _terminal as terminal
from els_client._options import MODEL, TARGET, AsJson, ModelName, Target, Timeout
from els_client._originality import COPIED, EIDETIC, MEMORISED, Originality
from els_client._types import Sampler
from els_client.errors import InvalidArgumentError

_ROWS = (
    ("gap_ratio", "gap ratio", f"memorised below {MEMORISED:.2f}"),
    ("carlini_ratio", "Carlini ratio", f"eidetic below {EIDETIC:g}"),
    ("largest_share", "largest share of a bank image", ""),
    ("sources_of_90", "bank images that make 90 %", ""),
    ("seams", "seams between neighbours", ""),
    ("clear", "pixels with few sources", ""),
    ("largest_region", "largest copied region", f"copied from {COPIED:g}"),
    ("in_place", "pixels from their own place", ""),
)
"""Measure → its name in the table, and the threshold."""


def originality(
    context: typer.Context,
    source: Annotated[
        Path | None,
        typer.Argument(metavar="[IN.png]", exists=True, dir_okay=False, show_default=False),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Sample a picture of this seed, instead of IN.png.", min=0)
    ] = None,
    first_image: Annotated[
        int | None, typer.Option(help="Image of the seed; by default 0.", min=0)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the sampler; by default 20.", min=1)
    ] = None,
    sampler: Annotated[
        Sampler | None, typer.Option(help="Sampler; by default ddim, pyramid for pictures.")
    ] = None,
    bank: Annotated[
        str | None,
        typer.Option(help="Model whose bank is used; by default --model.", metavar="MODEL"),
    ] = None,
    sigma: Annotated[
        float | None, typer.Option(help="Level at which sources of IN.png are found, as σ.")
    ] = None,
    label: Annotated[int | None, typer.Option(help="Label of the picture; -1 for none.")] = None,
    resize: Annotated[
        bool, typer.Option("--resize", help="Crop and scale IN.png to the bank's size.")
    ] = False,
    target: Target = TARGET,
    model: ModelName = MODEL,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Show how original a picture is: whether it was copied from a bank, and how much of it.

    Give a clean picture, or --seed to sample one, of a network too with --bank MODEL.
    """
    began = clock.perf_counter()
    drawn = {"seed": seed, "first_image": first_image, "steps": steps, "sampler": sampler}
    with options.connected(context, target, timeout) as client, terminal.waiting(f"asking {model}"):
        if source is not None:
            _check_none("IN.png", drawn)
            other = bank or model
            x = pictures.read(source, client.model(other).shape, resize=resize)
            (found,) = client.originality(x, model=other, label=label, sigma=sigma)
        else:
            if seed is None:
                raise InvalidArgumentError("IN.png: expected a picture or --seed, got neither")
            _check_none("--seed", {"sigma": sigma})
            if sampler is None:
                sampler = "pyramid" if client.model(model).scales else "ddim"
            *_, last = client.sample(
                model=model,
                seed=seed,
                first_image=first_image or 0,
                steps=steps,
                sampler=sampler,
                label=label,
                want=(),
                originality=bank or True,
            )
            (found,) = last.originality
    facts = {"model": model, "bank": bank or model, **facts_of(found)}
    _report(as_json, facts, found, clock.perf_counter() - began)


def facts_of(found: Originality) -> dict[str, Any]:
    """Return a report as JSON has it."""
    fields = {one.name: getattr(found, one.name) for one in dataclasses.fields(found)}
    arrays = ("nearest", "distances", "labels")
    return {
        **fields,
        **{name: fields[name].tolist() for name in arrays},
        **{name: getattr(found, name) for name in ("memorised", "eidetic", "copied")},
    }


def _check_none(field: str, others: dict[str, Any]) -> None:
    """Raise InvalidArgumentError if an option was given that does not go with ``field``."""
    for name, value in others.items():
        if value is not None:
            option = f"--{name.replace('_', '-')}"
            raise InvalidArgumentError(f"{option}: expected none with {field}, got {value}")


def _report(as_json: bool, facts: dict[str, Any], found: Originality, seconds: float) -> None:
    if as_json:
        typer.echo(json.dumps({**facts, "seconds": round(seconds, 3)}))
        return
    table = Table("measure", Column("value", justify="right"), "", box=SIMPLE_HEAD)
    for name, title, threshold in _ROWS:
        value = facts[name]
        if value is None:
            table.add_row(title, "–", Text(facts["absent"].get(name, "")))
        else:
            table.add_row(title, f"{value:.4g}", threshold)
    Console().print(table)
    pairs = zip(found.nearest.tolist(), found.distances.tolist(), strict=True)
    nearest = ", ".join(f"{image} at {distance:.3g}" for image, distance in list(pairs)[:4])
    typer.echo(f"nearest of {found.bank_images} bank images: {nearest or 'none of this size'}")
    typer.echo(f"{verdict(found)}, in {seconds:.1f} s")


def verdict(found: Originality) -> str:
    """Return in words what a report says."""
    words = [name for name in ("memorised", "eidetic", "copied") if getattr(found, name)]
    if words:
        return " and ".join(words)
    unknown = all(getattr(found, name) is None for name in ("memorised", "eidetic", "copied"))
    return "no measure applies" if unknown else "not memorised"
