"""``els remix``: new pictures of the world of one photograph."""

from __future__ import annotations

import json
import math
import time as clock
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from PIL import Image

from els_client import _embedded as embedded
from els_client import _options as options
from els_client import _pictures as pictures
from els_client import _remix_pictures as drawing
from els_client import _terminal as terminal
from els_client._client import Client
from els_client._models import Model
from els_client._options import AsJson, Timeout
from els_client._remix import Mode, check_mode
from els_client._remix_inputs import Size
from els_client._remix_progress import progress_of_steps
from els_client._types import Images
from els_client.errors import InvalidArgumentError

_PICTURE = {"exists": True, "dir_okay": False, "show_default": False}

_PATCH = 9
"""Side of a patch that a model has without the key."""
_SOURCE_SIGMA = 0.05
"""Noise level at which sources are found: one patch dominates most pixels."""


def remix(
    context: typer.Context,
    photo: Annotated[
        Path, typer.Argument(metavar="PHOTO", help="The photograph of the model.", **_PICTURE)
    ],
    out: Annotated[
        Path, typer.Option(help="Picture to write; several as a grid, and each as OUT-0.png …")
    ] = Path("remix.png"),
    size: Annotated[
        str | None,
        typer.Option(help="WIDTHxHEIGHT; by default at most 192 pixels a side.", metavar="WxH"),
    ] = None,
    count: Annotated[int, typer.Option(help="Number of pictures.", min=1)] = 1,
    mode: Annotated[
        Mode,
        typer.Option(
            help="new; wider, taller: the photograph in these proportions; tileable: edges meet; "
            "symmetric: mirrored; variation: similar to the photograph; inpaint: it, but for "
            "--mask; edit: --start made similar to it."
        ),
    ] = "new",
    strength: Annotated[
        float | None,
        typer.Option(
            help="How much wider, taller, variation, inpaint or edit change, up to 1.",
            show_default=False,
        ),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="Picture whose white pixels inpaint draws.", **_PICTURE)
    ] = None,
    start: Annotated[
        Path | None, typer.Option(help="Edited photograph or sketch, for edit.", **_PICTURE)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of each scale; by default 10.", min=2)
    ] = None,
    patch: Annotated[
        int | None,
        typer.Option(help="Side of a patch in pixels, odd: larger ones keep more. By default 9."),
    ] = None,
    sources: Annotated[
        int | None,
        typer.Option(help="At most so many patches of a scale, for large pictures.", min=1),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.", min=0)] = 0,
    gif: Annotated[Path | None, typer.Option(help="GIF of the steps of all scales.")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Write OUT-sources.png: where each pixel came from.")
    ] = False,
    target: Annotated[
        str | None,
        typer.Option(
            help="Address of a server that has the model; by default one is started.",
            metavar="HOST:PORT",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Name of that server's model, if it has several.")
    ] = None,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Draw new pictures of the world of a photograph, without training.

    Without --target a server of the photograph is started on this machine, and stopped afterwards,
    for which the extra "server" of this package has to be installed.
    """
    began = clock.perf_counter()
    with options.failures(), terminal.progress(share=True) as progress:
        files = _Files.of(out, gif, count, explain=explain)
        chosen: dict[str, Any] = {
            "mode": mode,
            "size": _size(size),
            "strength": strength,
            "mask": None if mask is None else pictures.opened(mask, _said),
            "start": None if start is None else pictures.opened(start, _said),
            "count": count,
            "seed": seed,
            "steps": steps,
        }
        shown = pictures.opened(photo, _said)
        inputs = ("strength", "mask", "start")
        check_mode(mode, {"picture", *(name for name in inputs if chosen[name] is not None)})
        own = {"patch": patch, "sources": sources}
        _check_server(target, model, own)
        keys = _keys(shown, photo, chosen["size"], own)
        bar = progress.add_task("starting a server" if target is None else "asking", total=None)
        with _connected(context, target, timeout, shown, keys) as client:
            ready = clock.perf_counter()
            described = _model(client, embedded.NAME if target is None else model)
            if explain and not described.has_sources:
                raise InvalidArgumentError(f"explain: {described.name} has no sources to name")
            frames: list[Images] = []
            done: list[float] = []
            for step in client.remix_steps(shown, model=described.name, **chosen):
                done = done or progress_of_steps(
                    described.scales, steps or described.scale_steps, step.total, sources
                )
                text = f"drawing, scale {step.scale + 1} of {step.scales}"
                progress.update(bar, description=text, completed=done[step.index], total=1)
                if gif:
                    frames.append(step.denoised)
            drawn = clock.perf_counter()
            files.write(step.x, frames)
            if explain:
                progress.update(bar, description="finding the sources", total=None)
                sheet = drawing.sources_sheet(step.x, *_sources(client, described, step.x))
                pictures.save(sheet, files.sources)
    facts = {"model": described.name, "mode": mode, "count": count, "seed": seed}
    seconds = {
        "start_seconds": ready - began,
        "draw_seconds": drawn - ready,
        "seconds": clock.perf_counter() - began,
    }
    _report(as_json, files, facts, seconds)


@dataclass(frozen=True)
class _Files:
    """Files that the command writes."""

    out: Path
    each: tuple[Path, ...]
    gif: Path | None
    sources: Path
    explain: bool

    @staticmethod
    def of(out: Path, gif: Path | None, count: int, *, explain: bool) -> _Files:
        """Return the files of some pictures.

        Raises:
            InvalidArgumentError: One of them cannot be written.
        """
        if gif and gif.suffix.lower() != ".gif":
            raise InvalidArgumentError(f"gif: expected a name that ends in .gif, got {gif}")
        for path in (out, gif):
            pictures.check_target(path)
        names = [out.with_stem(f"{out.stem}-{number}") for number in range(count)]
        sources = out.with_stem(f"{out.stem}-sources").with_suffix(".png")
        return _Files(out, tuple(names) if count > 1 else (), gif, sources, explain)

    def write(self, images: Images, frames: list[Images]) -> None:
        """Write the pictures [B, C, H, W], and the frames [B, C, h, w] of all scales."""
        if self.each:
            pictures.write_grid(self.out, images)
        else:
            pictures.write(self.out, images[0])
        for path, image in zip(self.each, images, strict=False):
            pictures.write(path, image)
        if self.gif:
            size = images.shape[2], images.shape[3]
            pictures.write_gif(self.gif, [drawing.enlarged(frame, size) for frame in frames])

    @property
    def paths(self) -> dict[str, Any]:
        """Names of the files, as the command prints them."""
        return {
            "out": str(self.out),
            **({"each": [str(path) for path in self.each]} if self.each else {}),
            **({"gif": str(self.gif)} if self.gif else {}),
            **({"sources": str(self.sources)} if self.explain else {}),
        }


def _said(text: str) -> None:
    typer.echo(text, err=True)


def _size(text: str | None) -> Size | None:
    """Return height and width of ``WxH``; None for None."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isascii() and side.isdigit() for side in sides):
        raise InvalidArgumentError(f"size: expected WIDTHxHEIGHT in pixels, got {text}")
    return int(sides[1]), int(sides[0])


def _check_server(target: str | None, model: str | None, keys: dict[str, int | None]) -> None:
    """Check that options go with a server that is started, or with another."""
    if target is None and model is not None:
        raise InvalidArgumentError("model: expected none without --target, as a server is started")
    for name, value in keys.items():
        if target is not None and value is not None:
            expected = "expected none with --target, whose model has its own"
            raise InvalidArgumentError(f"{name}: {expected}")


def _keys(
    photo: Image.Image, path: Path, size: Size | None, own: dict[str, int | None]
) -> dict[str, int | str]:
    """Return the keys of a model whose finest scale fits into the size of the pictures.

    Raises:
        InvalidArgumentError: The photograph is smaller than a patch.
    """
    patch = own["patch"] or _PATCH
    if min(photo.size) < patch:
        expected = f"{path}: expected sides of at least {patch} pixels, the patch"
        raise InvalidArgumentError(f"{expected}, got {photo.width}x{photo.height}")
    keys: dict[str, int | str] = {"source": path.name}
    keys |= {name: value for name, value in own.items() if value is not None}
    if size is not None:
        # At least as large as a patch, also for a narrow picture.
        least = patch / min(photo.size)
        factor = min(1.0, max(least, min(size[0] / photo.height, size[1] / photo.width)))
        keys["finest"] = math.ceil(factor * max(photo.size) - 1e-9)
    return keys


@contextmanager
def _connected(
    context: typer.Context,
    target: str | None,
    timeout_s: float | None,
    photo: Image.Image,
    keys: dict[str, int | str],
) -> Iterator[Client]:
    """Yield a client of a server, or of one that is started for it."""
    if target is not None:
        with options.connected(context, target, timeout_s) as client:
            yield client
        return
    with (
        embedded.serving(photo, keys) as address,
        Client(address, timeout_s=timeout_s) as client,
    ):
        yield client


def _model(client: Client, name: str | None) -> Model:
    """Return the description of a model, by default of the only one of kind picture.

    Raises:
        InvalidArgumentError: There are several, or none.
    """
    if name is not None:
        return client.model(name)
    names = [one.name for one in client.models() if one.scales]
    if len(names) != 1:
        listed = ", ".join(names) or "none (els-server picture add PHOTO NAME)"
        raise InvalidArgumentError(f"model: expected --model with one of kind picture: {listed}")
    return client.model(names[0])


def _sources(
    client: Client, model: Model, results: Images
) -> tuple[npt.NDArray[np.int64], list[Images]]:
    """Return the source of each pixel, and the photographs of the finest scale that have some.

    Sources [B, H, W, 3] are the index of such a photograph, row and column; photographs [C, h, w].
    """
    finest = len(model.scales) - 1
    every = model.bank.images if model.bank else 1
    found = client.explain(
        results, model=model.name, sigma=_SOURCE_SIGMA, label=finest, top=1, images=every
    )
    known = {number: image for images in found.images for number, image in images.items()}
    places = found.sources[:, :, :, 0].copy()
    places[..., 0] = -1
    for index, number in enumerate(sorted(known)):
        places[found.sources[:, :, :, 0, 0] == number, 0] = index
    return places, [known[number] for number in sorted(known)]


def _report(as_json: bool, files: _Files, facts: dict[str, Any], seconds: dict[str, float]) -> None:
    """Print the written files, and seconds of the parts."""
    if as_json:
        rounded = {name: round(value, 3) for name, value in seconds.items()}
        typer.echo(json.dumps({**files.paths, **facts, **rounded}))
        return
    listed = [path for value in files.paths.values() for path in np.atleast_1d(value)]
    start, draw, every = seconds.values()
    parts = f"{start:.1f} s until the server was ready, {draw:.1f} s to draw"
    typer.echo(f"wrote {', '.join(listed)} in {every:.1f} s ({parts})")
