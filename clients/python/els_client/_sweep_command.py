"""Command ``els sweep``: one seed under several samplers, noises and windows, on one sheet."""

from __future__ import annotations

import json
import time as clock
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image

from els_client import _explain_pictures as drawing
from els_client import _options as options
from els_client import _pictures as pictures
from els_client import _terminal as terminal
from els_client._client import Client
from els_client._models import Model
from els_client._options import MODEL, TARGET, AsJson, ModelName, Target, Timeout
from els_client._originality import Originality
from els_client._originality_command import facts_of, verdict
from els_client._picture_options import BankModel, Label, Size, size_of
from els_client._types import Images

_STEPS = 20
_ETAS = (0.5, 1.0)
_CHURNS = (0.0, 2.0, 4.0)
_SCALES = (0.5, 0.75, 1.5)
_CAUTION: drawing.Colour = (255, 166, 43)


@dataclass(frozen=True)
class Setting:
    """One picture of a sweep: its title, and its options of ``Client.sample``."""

    title: str
    options: dict[str, Any]


def sweep(
    context: typer.Context,
    out: Annotated[Path, typer.Argument(metavar="OUT.png", show_default=False)],
    seed: Annotated[int, typer.Option(help="Seed of all pictures.", min=0)] = 0,
    first_image: Annotated[int, typer.Option(help="Image of the seed.", min=0)] = 0,
    steps: Annotated[int, typer.Option(help="Steps of the samplers.", min=2)] = _STEPS,
    label: Label = None,
    size: Size = None,
    bank: BankModel = None,
    target: Target = TARGET,
    model: ModelName = MODEL,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Draw one seed with more and more noise: ddim, ddpm, heun with churn, other windows.

    Writes one sheet with the measures of originality below each picture. Windows are those of the
    model, scaled at every noise level; models without windows are drawn without these rows.
    """
    began = clock.perf_counter()
    with options.connected(context, target, timeout) as client, terminal.progress() as progress:
        pictures.check_target(out)
        served = client.model(model)
        settings = settings_of(served)
        bar = progress.add_task(f"{model}: one seed", total=len(settings))
        common: dict[str, Any] = {"model": model, "seed": seed, "first_image": first_image}
        common |= {"steps": steps, "label": label, "originality": bank or True, "want": ()}
        common |= {"size": size_of(size, served)}
        found: list[tuple[Setting, Images, Originality]] = []
        for setting in settings:
            found.append((setting, *_drawn(client, {**common, **setting.options})))
            progress.advance(bar)
        pictures.save(sheet(found), out)
    facts = [{"setting": one.title, **facts_of(report)} for one, _, report in found]
    if as_json:
        document = {"out": str(out), "model": model, "seed": seed, "pictures": facts}
        typer.echo(json.dumps({**document, "seconds": round(clock.perf_counter() - began, 3)}))
        return
    for one, _, report in found:
        typer.echo(f"{one.title:22} {' · '.join(_numbers(report))} · {verdict(report)}")
    typer.echo(f"wrote {out} in {clock.perf_counter() - began:.1f} s")


def settings_of(model: Model) -> list[Setting]:
    """Return the pictures of a sweep, in the order of the sheet."""
    settings = [Setting("ddim", {"sampler": "ddim"})]
    if model.scales:
        # At each scale its own number of steps.
        settings.insert(0, Setting("pyramid", {"sampler": "pyramid", "steps": None}))
    for eta in _ETAS:
        settings.append(Setting(f"ddpm, eta {eta:g}", {"sampler": "ddpm", "eta": eta}))
    for churn in _CHURNS:
        title = f"heun, churn {churn:g}"
        settings.append(Setting(title, {"sampler": "heun", "churn": churn}))
    # The patch of a picture is fixed: its table has a window, but no request has.
    if model.window is not None and min(max(model.window.k, default=1), model.window.max_k) > 1:
        for scale in _SCALES:
            settings.append(Setting(f"ddim, windows x {scale:g}", {"window_scale": scale}))
    return settings


def sheet(found: list[tuple[Setting, Images, Originality]]) -> Image.Image:
    """Return one picture of the pictures [C, H, W], with their measures below."""
    panels = []
    for setting, image, report in found:
        numbers = " · ".join(_numbers(report))
        flagged = any((report.memorised, report.eidetic, report.copied))
        panels.append(
            (
                drawing.enlarged_picture(image),
                setting.title,
                numbers,
                _CAUTION if flagged else drawing.INK,
            )
        )
    return drawing.arranged(panels)


def _drawn(client: Client, options: dict[str, Any]) -> tuple[Images, Originality]:
    *_, last = client.sample(**options)
    return last.x[0], last.originality[0]


def _numbers(report: Originality) -> list[str]:
    """Return the measures that fit below a picture."""
    named = (("gap", report.gap_ratio), ("share", report.largest_share), ("seams", report.seams))
    region = ("region", report.largest_region)
    # Of one picture of the size all shares are 1: the region says more.
    chosen = (region, ("in place", report.in_place)) if report.gap_ratio is None else named
    return [f"{name} {value:.2f}" for name, value in chosen if value is not None] or ["–"]
