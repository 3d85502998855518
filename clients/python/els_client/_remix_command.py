"""``els remix``: new pictures of the world of one photograph."""

from __future__ import annotations

import time as clock
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from els_client import _options as options
from els_client import _pictures as pictures
from els_client import _terminal as terminal
from els_client._options import MODEL, TARGET, AsJson, ModelName, Target, Timeout
from els_client._types import Model
from els_client.errors import InvalidArgumentError

Mode = Literal["new", "tileable", "symmetric", "variation", "retarget"]


def remix(
    context: typer.Context,
    photo: Annotated[
        Path,
        typer.Argument(
            metavar="PHOTO",
            exists=True,
            dir_okay=False,
            show_default=False,
            help="The photograph of the model; variation and retarget start from it.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Picture to write; several as one grid.")] = Path(
        "remix.png"
    ),
    size: Annotated[
        str | None, typer.Option(help="WIDTHxHEIGHT; by default the model's.", metavar="WxH")
    ] = None,
    count: Annotated[int, typer.Option(help="Number of pictures.", min=1)] = 1,
    mode: Annotated[
        Mode,
        typer.Option(
            help="new; tileable: edges meet; symmetric: mirrored; variation: close to the "
            "photograph; retarget: the photograph made wider or taller."
        ),
    ] = "new",
    strength: Annotated[
        float, typer.Option(help="Noise of variation and retarget, up to 1.")
    ] = 0.6,
    steps: Annotated[
        int | None, typer.Option(help="Steps of each scale; by default the model's.", min=2)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.", min=0)] = 0,
    target: Target = TARGET,
    model: ModelName = MODEL,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Draw new pictures from a model of kind picture that the server has."""
    began = clock.perf_counter()
    with options.connected(context, target, timeout) as client, terminal.progress() as progress:
        pictures.check_target(out)
        served = client.model(model)
        if not served.scales:
            expected = "expected a model of kind picture (els-server picture add PHOTO NAME)"
            raise InvalidArgumentError(f"model: {expected}, got {model} of kind {served.kind}")
        height, width = _size(size, served)
        chosen: dict[str, Any] = {"tileable": mode == "tileable", "symmetric": mode == "symmetric"}
        if mode in ("variation", "retarget"):
            shape = served.channels, height, width
            stretched = mode == "retarget"
            start = pictures.read(photo, shape, resize=True, stretch=stretched)
            chosen |= {"start": start, "start_time": strength}
        bar = progress.add_task(f"{model}: {count} pictures", total=None)
        for step in client.sample(
            model=model,
            sampler="pyramid",
            size=(height, width),
            count=count,
            seed=seed,
            steps=steps,
            want=set(),
            **chosen,
        ):
            progress.update(bar, completed=step.index, total=step.total)
        pictures.write_grid(out, step.x)
    terminal.report(as_json, began, out, None, model=model, count=count, seed=seed)


def _size(text: str | None, model: Model) -> tuple[int, int]:
    """Return height and width of ``WxH``; those of the model for None."""
    if text is None:
        return model.height, model.width
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isascii() and side.isdigit() for side in sides):
        raise InvalidArgumentError(f"size: expected WIDTHxHEIGHT in pixels, got {text}")
    return int(sides[1]), int(sides[0])
