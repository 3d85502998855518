"""Options of the commands that take a picture, or sample one, and what they have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer

from els_client import _options as options
from els_client import _pictures as pictures
from els_client._models import Model
from els_client._types import Sampler
from els_client.errors import InvalidArgumentError

Source = Annotated[
    Path, typer.Argument(metavar="IN.png", exists=True, dir_okay=False, show_default=False)
]
Sigma = Annotated[float | None, typer.Option(help="Noise level of x = x0 + σ·ε.")]
AlphaBar = Annotated[float | None, typer.Option(help="Noise level of x = √ᾱ·x0 + √(1-ᾱ)·ε.")]
Time = Annotated[float | None, typer.Option(help="Noise level as time on the model's schedule.")]
Label = Annotated[int | None, typer.Option(help="Label of the picture; -1 for none.")]
Window = Annotated[int | None, typer.Option(help="Odd side of the patch in pixels.")]
Resize = Annotated[
    bool, typer.Option("--resize", help="Crop and scale the picture to the model's size.")
]
Size = Annotated[
    str | None,
    typer.Option(
        help="HEIGHTxWIDTH, for a model that has sizes; by default the model's.", metavar="HxW"
    ),
]

MaybeSource = Annotated[
    Path | None,
    typer.Argument(metavar="[IN.png]", exists=True, dir_okay=False, show_default=False),
]
Seed = Annotated[
    int | None, typer.Option(help="Sample a picture of this seed, instead of IN.png.", min=0)
]
FirstImage = Annotated[int | None, typer.Option(help="Image of the seed; by default 0.", min=0)]
Steps = Annotated[int | None, typer.Option(help="Steps of the sampler; by default 20.", min=1)]
MaybeSampler = Annotated[
    Sampler | None, typer.Option(help="Sampler; by default ddim, pyramid for pictures.")
]
BankModel = Annotated[
    str | None,
    typer.Option(help="Model whose bank is used; by default --model.", metavar="MODEL"),
]


def read(source: Path, model: Model, *, resize: bool) -> npt.NDArray[np.uint8]:
    """Return a picture as a model takes it: of its size, or of one that it answers."""
    return pictures.read(source, model.shape, resize=resize, sizes=model.sizes)


def shape_of(size: str | None, model: Model) -> tuple[int, int, int]:
    """Return (C, H, W) of the images to sample; raises InvalidArgumentError if it has one size."""
    if size is None:
        return model.shape
    height, width = options.sides(size, "HEIGHTxWIDTH")
    if model.sizes is None and (height, width) != model.shape[1:]:
        expected = f"expected none, as {model.name} has {model.height}x{model.width} alone"
        raise InvalidArgumentError(f"size: {expected}, got {size}")
    return model.channels, height, width


def size_of(size: str | None, model: Model) -> tuple[int, int] | None:
    """Return height and width of ``--size``; None if it is not given."""
    return None if size is None else shape_of(size, model)[1:]


def check_one(source: Path | None, drawn: dict[str, Any], read: dict[str, Any]) -> None:
    """Check that a picture is either read or sampled, with options of that alone.

    Args:
        source: Picture to read.
        drawn: Options of a sample, the seed among them; None for those not given.
        read: Options of a picture that is read.

    Raises:
        InvalidArgumentError: It is neither, or has an option of the other.
    """
    if source is None and drawn["seed"] is None:
        raise InvalidArgumentError("IN.png: expected a picture or --seed, got neither")
    field, others = ("--seed", read) if source is None else ("IN.png", drawn)
    for name, value in others.items():
        if value is not None:
            option = f"--{name.replace('_', '-')}"
            raise InvalidArgumentError(f"{option}: expected none with {field}, got {value}")
