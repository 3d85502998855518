"""Command ``els originality``: whether a picture was copied from a bank."""

from __future__ import annotations

import dataclasses
import json
import time as clock
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from els_client import _options as options
from els_client import _terminal as terminal
from els_client._options import MODEL, TARGET, AsJson, ModelName, Target, Timeout
from els_client._originality import COPIED, EIDETIC, MEMORISED, Originality
from els_client._picture_options import (
    BankModel,
    FirstImage,
    Label,
    MaybeSampler,
    MaybeSource,
    Resize,
    Seed,
    Size,
    Steps,
    check_one,
    read,
    size_of,
)

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
    source: MaybeSource = None,
    seed: Seed = None,
    first_image: FirstImage = None,
    size: Size = None,
    steps: Steps = None,
    sampler: MaybeSampler = None,
    bank: BankModel = None,
    sigma: Annotated[
        float | None, typer.Option(help="Level at which sources of IN.png are found, as σ.")
    ] = None,
    label: Label = None,
    resize: Resize = False,
    target: Target = TARGET,
    model: ModelName = MODEL,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Show how original a picture is: whether it was copied from a bank, and how much of it.

    Give a clean picture, or --seed to sample one, of a network too with --bank MODEL.
    """
    began = clock.perf_counter()
    drawn = {"seed": seed, "first_image": first_image, "size": size}
    drawn |= {"steps": steps, "sampler": sampler}
    with options.connected(context, target, timeout) as client, terminal.waiting(f"asking {model}"):
        check_one(source, drawn, {"sigma": sigma})
        if source is not None:
            other = client.model(bank or model)
            x = read(source, other, resize=resize)
            (found,) = client.originality(x, model=other.name, label=label, sigma=sigma)
        else:
            assert seed is not None
            served = client.model(model)
            *_, last = client.sample(
                model=model,
                seed=seed,
                first_image=first_image or 0,
                size=size_of(size, served),
                steps=steps,
                sampler=sampler or ("pyramid" if served.scales else "ddim"),
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
