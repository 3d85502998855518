"""``els-server bank``: build image banks from data sets, and describe banks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from els_service.cli.progress import Progress
from els_service.denoisers.bank_sources import FORMATS, read_pictures, read_source
from els_service.denoisers.banks import save_bank
from els_service.denoisers.mixed_banks import AnyBank, MixedBank, load_any_bank
from els_service.errors import ElsError, InvalidArgumentError

_SHOWN = 10
"""Maximum skipped files to list."""

app = typer.Typer(
    help="Build and inspect image banks.", no_args_is_help=True, rich_markup_mode=None
)


@app.command()
def build(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="The data set: a file or a folder.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="The bank to write.")],
    format: Annotated[str, typer.Option(help=f"auto, {', '.join(FORMATS)}.")] = "auto",
    labels: Annotated[
        Path | None, typer.Option(help="Labels of an IDX source. [default: the file in its folder]")
    ] = None,
    label_names: Annotated[
        str, typer.Option(help='One for each label, "a,b,…". [default: of the source]')
    ] = "",
    limit: Annotated[
        int | None, typer.Option(help="Maximum number of images, the first in file order.")
    ] = None,
    per_label: Annotated[
        int | None, typer.Option(help="Maximum number of images of each label.")
    ] = None,
    resize: Annotated[
        str | None, typer.Option(help="Resize every image to HxW pixels, or N for NxN.")
    ] = None,
    crop: Annotated[
        bool, typer.Option(help="Keep proportions: cut about the centre before --resize.")
    ] = False,
    keep_sizes: Annotated[
        bool, typer.Option(help="Keep the size of each picture, for models with sizes.")
    ] = False,
    source_name: Annotated[
        str | None, typer.Option(help="Origin of the images. [default: name of SOURCE]")
    ] = None,
    licence: Annotated[str, typer.Option(help="Licence of the images.")] = "",
    skip_unreadable: Annotated[
        bool, typer.Option(help="Skip and count pictures that cannot be read.")
    ] = False,
) -> None:
    """Build a bank from IDX (.gz too), a folder of images, .npz or the CIFAR-10 PNG strips.

    Pictures must be 8-bit grey or RGB, with one frame, no transparency and at most 67 million
    pixels; others are rejected by name. They are rotated by their EXIF orientation.
    """
    skipped: list[str] = []
    with _one_line_errors(), Progress(f"Reading {source}", every_s=5.0, quiet_s=5.0) as progress:
        if out.suffix != ".safetensors":
            raise InvalidArgumentError("OUT", "a name that ends in .safetensors", out)
        common: dict[str, Any] = {
            "format": format,
            "label_names": _split_names(label_names),
            "limit": limit,
            "per_label": per_label,
            "skipped": (lambda error: skipped.append(str(error))) if skip_unreadable else None,
            "progress": lambda done, total: progress(done, total, f"{done} of {total} images"),
        }
        size = None if resize is None else _parse_size(resize)
        if keep_sizes:
            _check_none_of({"labels": labels, "resize": resize, "crop": crop or None})
            bank = read_pictures(source, **common)
        else:
            bank = read_source(source, labels=labels, resize=size, crop=crop, **common)
        bank = dataclasses.replace(
            bank, source=source_name or source.resolve().name, licence=licence
        )
        save_bank(bank, out)
    _print_table(out, bank)
    if skip_unreadable:
        _report_skipped(skipped)
    if bank.dtype == np.float32 and bank.images.min() >= 0:
        hint = "no pixel is below 0, but pixels are from -1 to 1: if black is 0, write 2·x - 1"
        typer.echo(f"hint: {hint}", err=True)
    # Local import: the engine takes a second.
    from els_service.cli.speed import describe_bank_speed

    typer.echo(describe_bank_speed(bank))
    if isinstance(bank, MixedBank):
        typer.echo("a model.yaml of this bank has machine: els and sizes: any, or ranges")
        return
    typer.echo(
        "windows, once a model.yaml names the bank: els-server calibrate --held-out MODEL_FOLDER"
    )


def _check_none_of(options: dict[str, Any]) -> None:
    """Raise InvalidArgumentError if an option was given that does not go with keep_sizes."""
    for name, value in options.items():
        if value is not None:
            raise InvalidArgumentError(name, "none with --keep-sizes", value)


def _report_skipped(skipped: list[str]) -> None:
    for text in skipped[:_SHOWN]:
        typer.echo(f"skipped: {text}", err=True)
    if len(skipped) > _SHOWN:
        typer.echo(f"skipped: … and {len(skipped) - _SHOWN} more", err=True)
    typer.echo(f"{len(skipped)} files skipped: cannot be read", err=True)


@app.command()
def info(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A bank.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Describe a bank: sizes, labels, source, licence and fingerprint."""
    with _one_line_errors():
        bank = load_any_bank(file)
    if as_json:
        typer.echo(json.dumps(_describe(bank), ensure_ascii=False))
    else:
        _print_table(file, bank)


def _describe(bank: AnyBank) -> dict[str, Any]:
    # No counts for absent labels: a file may have a single huge label.
    labels, counts = np.unique(bank.labels, return_counts=True)
    entries = [
        {"label": int(label), "name": _name(bank, label), "images": int(count)}
        for label, count in zip(labels, counts, strict=True)
    ]
    return {
        "images": len(bank),
        "shape": bank.shape,
        **({"sizes": _sizes(bank)} if isinstance(bank, MixedBank) else {}),
        "dtype": bank.dtype.name,
        "labels": entries if bank.label_count else [],
        "source": bank.source,
        "licence": bank.licence,
        "fingerprint": bank.fingerprint,
        **({} if bank.file_names is None else {"file_names": len(bank.file_names)}),
    }


def _sizes(bank: MixedBank) -> dict[str, Any]:
    """Return the ranges of height and width, and the most frequent sizes with their counts."""
    height, width = bank.sides
    sizes, counts = np.unique(bank.extents, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:_SHOWN]
    most = [
        {"height": int(sizes[i, 0]), "width": int(sizes[i, 1]), "images": int(counts[i])}
        for i in order
    ]
    return {"height": height, "width": width, "different": len(sizes), "most": most}


def _name(bank: AnyBank, label: int) -> str | None:
    return bank.label_names[label] if bank.label_names else None


def _print_table(file: Path, bank: AnyBank) -> None:
    facts = _describe(bank)
    labels = [
        " × ".join((f"{entry['label']} {entry['name'] or ''}".rstrip(), str(entry["images"])))
        for entry in facts["labels"]
    ]
    facts |= {"shape": " × ".join(map(str, bank.shape)), "labels": "\n".join(labels)}
    if isinstance(bank, MixedBank):
        (low, high), (wide_low, wide_high) = bank.sides
        different = facts["sizes"]["different"]
        span = f"heights {low} to {high}, widths {wide_low} to {wide_high}"
        facts["sizes"] = f"{different} different, {span}; shape is the most frequent"
    table = Table("", Column(overflow="fold"), show_header=False)
    for name, value in {"file": file, **facts}.items():
        # Text, because a string would be parsed as markup.
        table.add_row(name, Text(str(value) or "none"))
    Console().print(table)


def _split_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",")) if text else ()


def _parse_size(text: str) -> tuple[int, int]:
    """Return (H, W) of "HxW", or of "N" for a square."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() for side in sides):
        raise InvalidArgumentError("resize", "HxW or N, in pixels", text)
    return int(sides[0]), int(sides[-1])


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Exit with code 2 and one line on stderr if a file or an argument is invalid."""
    try:
        yield
    except (ElsError, OSError) as error:
        typer.echo("error: " + " ".join(str(error).split()), err=True)
        raise typer.Exit(2) from error
