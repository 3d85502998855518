"""Command ``els explain``: where each pixel of a denoised or sampled picture came from."""

from __future__ import annotations

import json
import time as clock
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from els_client import _explain_pictures as drawing
from els_client import _options as options
from els_client import _pictures as pictures
from els_client import _terminal as terminal
from els_client._client import Client
from els_client._explanation import Explanation
from els_client._models import Model
from els_client._options import MODEL, TARGET, AsJson, ModelName, Target, Timeout
from els_client._picture_options import (
    FirstImage,
    Label,
    MaybeSampler,
    MaybeSource,
    Resize,
    Seed,
    Size,
    Steps,
    Window,
    check_one,
    read,
    size_of,
)
from els_client._types import Sampler
from els_client.errors import InvalidArgumentError

_STEPS = 20


def explain(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option(help="Folder to write, made if it is missing.", show_default=False)
    ],
    source: MaybeSource = None,
    sigma: Annotated[float | None, typer.Option(help="Noise level of IN.png, as σ.")] = None,
    alpha_bar: Annotated[float | None, typer.Option(help="Noise level of IN.png, as ᾱ.")] = None,
    time: Annotated[float | None, typer.Option(help="Noise level of IN.png, as time.")] = None,
    seed: Seed = None,
    first_image: FirstImage = None,
    size: Size = None,
    steps: Steps = None,
    sampler: MaybeSampler = None,
    step: Annotated[
        int | None, typer.Option(help="Step to explain; by default the last.", min=1)
    ] = None,
    label: Label = None,
    window: Window = None,
    resize: Resize = False,
    target: Target = TARGET,
    model: ModelName = MODEL,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Show from which bank images each pixel of a picture came.

    Give a noisy picture with its noise level, or --seed to sample one. Writes mosaic.png, each
    pixel in the colour of its source image; displacement.png; entropy.png; and sheet.png, the
    picture beside these maps and the eight bank images that it took most from.
    """
    began = clock.perf_counter()
    level: dict[str, Any] = {"sigma": sigma, "alpha_bar": alpha_bar, "time": time}
    drawn: dict[str, Any] = {"seed": seed, "first_image": first_image, "size": size}
    drawn |= {"steps": steps, "sampler": sampler, "step": step}
    common: dict[str, Any] = {"model": model, "label": label, "window": window}
    with options.connected(context, target, timeout) as client, terminal.waiting(f"asking {model}"):
        check_one(source, drawn, level)
        out.mkdir(exist_ok=True)
        described = client.model(model)
        if source is not None:
            x = read(source, described, resize=resize)
            found = client.explain(x, images=drawing.SHOWN, **level, **common)
        else:
            found = _sampled(client, described, common, **drawn)
        written = _draw(out, found, described)
    facts = {"out": str(out), "files": written, "model": model, **_facts(found)}
    _report(as_json, facts, clock.perf_counter() - began)


def _sampled(
    client: Client,
    described: Model,
    common: dict[str, Any],
    *,
    seed: int,
    first_image: int | None,
    size: str | None,
    steps: int | None,
    sampler: Sampler | None,
    step: int | None,
) -> Explanation:
    """Return the explanation of one step of a sample."""
    count, kind = steps or _STEPS, sampler or "ddim"
    if described.scales and sampler in (None, "pyramid"):
        # Steps of each scale.
        count, kind = steps or described.scale_steps, "pyramid"
    last = count * len(described.scales) if kind == "pyramid" else count
    explained = step or last - (kind == "ddim_released")
    way = client.sample(
        seed=seed,
        first_image=first_image or 0,
        size=size_of(size, described),
        steps=count,
        sampler=kind,
        want=(),
        explain_steps=[explained],
        explain_images=drawing.SHOWN,
        **common,
    )
    for one in way:
        if one.index == explained:
            return one.explanation
    raise InvalidArgumentError(f"--step: expected a step of the sample, got {explained}")


def _draw(folder: Path, found: Explanation, model: Model) -> list[str]:
    """Write the pictures of an explanation; return their names."""
    wraps = model.padding == "circular"
    files = {
        "mosaic.png": drawing.enlarged(drawing.mosaic(found)),
        "displacement.png": drawing.enlarged(drawing.displacement(found, wraps=wraps)),
        "entropy.png": drawing.enlarged(drawing.entropy(found)),
        "sheet.png": drawing.sheet(found, wraps=wraps),
    }
    for name, picture in files.items():
        pictures.save(picture, folder / name)
    return [str(folder / name) for name in files]


def _facts(found: Explanation) -> dict[str, Any]:
    """Return the summary of an explanation for the terminal."""
    return {
        "entropy": float(found.entropy.mean()),
        "effective_sources": float(np.median(found.effective_sources)),
        "variance": float(found.variance.mean()),
        "bank_fingerprint": found.bank_fingerprint,
        "bank_images": [
            {
                "image": one.image,
                "label": one.label,
                "file": one.file,
                "share": one.share,
                "pixels": int(one.pixels.sum()),
            }
            for one in drawing.taken_from(found)
        ],
    }


def _report(as_json: bool, facts: dict[str, Any], seconds: float) -> None:
    if as_json:
        typer.echo(json.dumps({**facts, "seconds": round(seconds, 3)}))
        return
    rows = facts["bank_images"]
    columns = [name for name in ("image", "label", "file") if any(row[name] != "" for row in rows)]
    numbers = (Column(name, justify="right") for name in ("share", "pixels"))
    table = Table("", *columns, *numbers, box=SIMPLE_HEAD)
    for row, (red, green, blue) in zip(rows, drawing.PALETTE, strict=False):
        block = Text("■", style=f"rgb({red},{green},{blue})")
        # Text, because a string would be parsed as markup.
        texts = (Text(str(row[name])) for name in columns)
        table.add_row(block, *texts, f"{100 * row['share']:.1f} %", str(row["pixels"]))
    Console().print(table)
    rest = 1 - sum(row["share"] for row in rows)
    typer.echo(
        f"all other images {100 * max(rest, 0.0):.1f} % · mean entropy {facts['entropy']:.2f} nats"
        f" · half of the pixels have at most {facts['effective_sources']:.3g} effective sources"
    )
    typer.echo(f"wrote {', '.join(facts['files'])} in {seconds:.1f} s")
