"""``els-server bank``: build image banks from data sets, and describe banks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from els_service.cli.progress import Progress
from els_service.denoisers.bank_build_records import Request
from els_service.denoisers.bank_builds import build_parts
from els_service.denoisers.bank_mirrors import PROVENANCE
from els_service.denoisers.bank_parts import BankReader, manifest_of
from els_service.denoisers.bank_sources import (
    FORMATS,
    open_source,
    read_pictures,
    read_source,
    size_of,
)
from els_service.denoisers.banks import save_bank
from els_service.denoisers.mixed_banks import AnyBank, MixedBank, load_any_bank
from els_service.denoisers.parquet_sources import Columns
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
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT.safetensors", help="The bank to write; a folder if in parts."),
    ],
    format: Annotated[str, typer.Option(help=f"auto, {', '.join(FORMATS)}.")] = "auto",
    labels: Annotated[
        Path | None, typer.Option(help="Labels of an IDX source. [default: the file in its folder]")
    ] = None,
    image_column: Annotated[
        str | None, typer.Option(help="Pictures of a Parquet source. [default: the only column]")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Labels of a Parquet source. [default: label, if any]")
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
    mirror: Annotated[
        bool, typer.Option(help="Add the mirror image of each image, as training with flips does.")
    ] = False,
    source_name: Annotated[
        str | None, typer.Option(help="Origin of the images. [default: name of SOURCE]")
    ] = None,
    licence: Annotated[str, typer.Option(help="Licence of the images.")] = "",
    skip_unreadable: Annotated[
        bool, typer.Option(help="Skip and count pictures that cannot be read.")
    ] = False,
    shard_size: Annotated[
        int | None,
        typer.Option(help="Images of a part: for sources larger than memory, resumable."),
    ] = None,
) -> None:
    """Build a bank from pictures (folder, tar, Parquet), IDX (.gz), .npz or CIFAR-10 PNG strips.

    With --shard-size OUT is a folder of parts and a manifest; the same command continues a build
    that was killed.

    Pictures must be 8-bit grey or RGB, with one frame, no transparency and at most 67 million
    pixels; others are rejected by name. They are rotated by their EXIF orientation.
    """
    skipped: list[str] = []
    with _one_line_errors(), Progress(f"Reading {source}", every_s=5.0, quiet_s=5.0) as progress:
        reading: dict[str, Any] = {
            "format": format,
            "label_names": _split_names(label_names),
            "columns": Columns(image_column, label_column),
        }
        chosen: dict[str, Any] = {"limit": limit, "per_label": per_label, "mirror": mirror}
        size = None if resize is None else _parse_size(resize)
        name = source_name or source.resolve().name
        name = f"{name}: {PROVENANCE}" if mirror else name

        def report(done: int, total: int) -> None:
            progress(done, total, f"{done} of {total} images")

        if shard_size is not None:
            _check_none_of("--shard-size", {"keep_sizes": keep_sizes or None})
            sizes = size_of(size, crop)
            opened = open_source(source, labels=labels, **reading)
            given = {"format": format, "image_column": image_column, "label_column": label_column}
            described = {**given, "labels": labels and labels.name}
            request = Request(
                shard_size,
                limit,
                per_label,
                sizes,
                skip_unreadable,
                name,
                licence,
                described,
                mirror,
            )
            built = build_parts(*opened, out, request, report)
            _print_table(out, BankReader(out))
            if skip_unreadable:
                _report_skipped(built.first_skipped, built.manifest.skipped)
            return
        if out.suffix != ".safetensors":
            raise InvalidArgumentError("OUT", "a name that ends in .safetensors", out)
        chosen["progress"] = report
        chosen["skipped"] = (lambda error: skipped.append(str(error))) if skip_unreadable else None
        if keep_sizes:
            given_sizes = {"labels": labels, "resize": resize, "crop": crop or None}
            _check_none_of("--keep-sizes", given_sizes)
            bank = read_pictures(source, **reading, **chosen)
        else:
            bank = read_source(source, labels=labels, resize=size, crop=crop, **reading, **chosen)
        bank = dataclasses.replace(bank, source=name, licence=licence)
        save_bank(bank, out)
    _print_table(out, bank)
    if skip_unreadable:
        _report_skipped(skipped, len(skipped))
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


def _check_none_of(option: str, others: dict[str, Any]) -> None:
    """Raise InvalidArgumentError if an option was given that does not go with another."""
    for name, value in others.items():
        if value is not None:
            raise InvalidArgumentError(name, f"none with {option}", value)


def _report_skipped(errors: Sequence[str], count: int) -> None:
    for text in errors[:_SHOWN]:
        typer.echo(f"skipped: {text}", err=True)
    if count > _SHOWN:
        typer.echo(f"skipped: … and {count - _SHOWN} more", err=True)
    typer.echo(f"{count} files skipped: cannot be read", err=True)


@app.command()
def info(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A bank: a file, or a folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Describe a bank: sizes, labels, source, licence and fingerprint."""
    with _one_line_errors():
        bank: AnyBank | BankReader
        if manifest_of(file) is None:
            bank = load_any_bank(file)
        else:
            bank = BankReader(file)
            bank.verify()
    if as_json:
        typer.echo(json.dumps(_describe(bank), ensure_ascii=False))
    else:
        _print_table(file, bank)


def _describe(bank: AnyBank | BankReader) -> dict[str, Any]:
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
        **_files(bank),
    }


def _files(bank: AnyBank | BankReader) -> dict[str, int]:
    """Return the number of parts of a bank, or of the names of its files, if it has any."""
    if isinstance(bank, BankReader):
        return {} if bank.manifest is None else {"parts": len(bank.manifest.parts)}
    return {} if bank.file_names is None else {"file_names": len(bank.file_names)}


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


def _name(bank: AnyBank | BankReader, label: int) -> str | None:
    return bank.label_names[label] if bank.label_names else None


def _print_table(file: Path, bank: AnyBank | BankReader) -> None:
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
