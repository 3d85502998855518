"""``els-server picture``: model folders that draw new pictures from a photograph."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from els_service.errors import ElsError, InvalidArgumentError, LoadError

if TYPE_CHECKING:
    from els_service.denoisers.base import Denoiser

_FAULT = 2

app = typer.Typer(
    help="Make models from a photograph.", no_args_is_help=True, rich_markup_mode=None
)


@app.callback()
def _group() -> None:
    """Keep the command's name although there is one command."""


@app.command()
def add(
    photo: Annotated[
        list[Path], typer.Argument(metavar="PHOTO... NAME", help="Pictures, and the model's name.")
    ],
    models: Annotated[Path, typer.Option(help="Folder of models.")],
    patch: Annotated[int, typer.Option(help="Side of a patch in pixels, odd.")] = 9,
    finest: Annotated[
        int, typer.Option(help="Long side of the finest scale; larger pictures are reduced.")
    ] = 192,
    sources: Annotated[
        int | None, typer.Option(help="At most so many patches of each scale. [default: all]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the patches that --sources chooses.")] = 0,
    source: Annotated[str, typer.Option(help="Origin. [default: names of the files]")] = "",
    licence: Annotated[str, typer.Option(help="Licence of the pictures.")] = "",
) -> None:
    """Make the folder of a model of kind picture, and check that it loads.

    Pictures are grey or RGB, with one frame and no transparency; palettes and 16 bits are converted
    to 8 bits. With --sources it prints how far the answers are from those of all patches.
    """
    try:
        if len(photo) < 2:
            raise InvalidArgumentError("PHOTO NAME", "a picture and a name", photo[0])
        *pictures, name = photo
        keys: dict[str, int | str] = {"patch": patch, "finest": finest}
        texts = {"source": source, "licence": licence}
        if sources is not None:
            keys |= {"sources": sources, "seed": seed}
        keys.update({key: text for key, text in texts.items() if text})
        typer.echo(_add(pictures, str(name), models, keys))
    except (ElsError, OSError) as error:
        typer.echo("error: " + " ".join(str(error).split()), err=True)
        raise typer.Exit(_FAULT) from error


def _add(pictures: list[Path], name: str, models: Path, keys: dict[str, int | str]) -> str:
    """Make the folder, and return a description of the model; nothing is left of a failure.

    Raises:
        LoadError: A picture or a key is invalid, or the folder exists.
        InvalidArgumentError: The name is none of a model.
        OSError: The folder cannot be written.
    """
    # Local import: the engine takes a second.
    from els_service.cli.speed import describe_speed
    from els_service.repository import ModelRepository

    if Path(name).name != name or name.startswith(("_", ".")) or not name.isprintable():
        raise InvalidArgumentError("NAME", "a folder's name without / and leading _ or .", name)
    folder = models / name
    models.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir()
    except FileExistsError as error:
        raise LoadError(folder, "expected no such model, found one") from error
    try:
        words: list[str] = []
        files = [_copied(one, folder, index, words) for index, one in enumerate(pictures)]
        lines = {"kind": "picture", "pictures": files, **keys}
        # JSON values are valid YAML.
        text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in lines.items())
        (folder / "model.yaml").write_text(text)
        denoiser = ModelRepository(models).load(name)
    except BaseException:
        shutil.rmtree(folder)
        raise
    scales = ", ".join(f"{height}x{width}" for height, width in denoiser.info.scales)
    facts = f"scales {scales}; {describe_speed(denoiser)}{_describe_subset(denoiser)}"
    return "\n".join([*words, f"{folder}: {facts}"])


def _describe_subset(denoiser: Denoiser) -> str:
    """Return the error of a part of the patches against all of them, as text, if it is a part."""
    from els_service.denoisers.picture_subset import PROBED, SubsetDenoiser

    if not isinstance(denoiser, SubsetDenoiser):
        return ""
    errors = ", ".join(f"{100 * error:.2g} %" for error in denoiser.errors())
    alphas = ", ".join(f"{alpha:g}" for alpha in PROBED)
    counts = ", ".join(map(str, denoiser.counts))
    return (
        f"; {counts} patches of its scales: D differs from that of all patches by {errors} of its "
        f"norm at α = {alphas}"
    )


def _copied(picture: Path, folder: Path, index: int, words: list[str]) -> str:
    """Copy a picture into a folder, converted if it has to be; return its name there.

    Args:
        picture: file to copy.
        folder: of the model.
        index: of the picture, which is its name if another has its own.
        words: gets what was converted.
    """
    # Local import: Pillow and numpy take a moment.
    from els_service.denoisers.picture_conversion import converted_picture

    if not picture.is_file():
        raise LoadError(picture, "expected a file, found none")
    found = converted_picture(picture)
    suffix = picture.suffix.lower() if found is None else ".png"
    own = picture.name if found is None else f"{picture.stem}.png"
    name = f"{index}{suffix}" if (folder / own).exists() else own
    if found is None:
        shutil.copyfile(picture, folder / name)
    else:
        found[0].save(folder / name)
        words.append(f"{picture.name}: converted from {found[1]} to {name}")
    return name
