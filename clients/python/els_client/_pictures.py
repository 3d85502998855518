"""Between arrays [C, H, W] in [-1, 1] and files: PNG, GIF, npy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from els_client._types import Images
from els_client.errors import InvalidArgumentError

_MODES = {1: "L", 3: "RGB"}
# Grids and GIFs enlarge small images to about this side, in whole factors.
_TILE_SIDE = 112
_GIF_MS = 100
_GIF_LAST_MS = 1500


def read(path: Path, shape: tuple[int, int, int], *, resize: bool) -> npt.NDArray[np.uint8]:
    """Return the picture as uint8 [1, C, H, W], grey or RGB as ``shape`` (C, H, W) asks.

    Args:
        path: A picture of 8 bits a channel.
        shape: What the model takes.
        resize: Whether to crop another proportion about the centre and scale it to fit.

    Raises:
        InvalidArgumentError: No such picture, or it is of another size and not to be resized.
    """
    channels, height, width = shape
    if channels not in _MODES:
        raise InvalidArgumentError(f"pictures have 1 or 3 channels, the model {channels}")
    try:
        with Image.open(path) as source:
            if source.mode.startswith(("I", "F")):
                raise InvalidArgumentError(f"{path}: expected 8 bits a channel, got {source.mode}")
            picture = source.convert(_MODES[channels])
    except (UnidentifiedImageError, SyntaxError):
        raise InvalidArgumentError(f"{path}: not a picture") from None
    except OSError as error:
        raise InvalidArgumentError(f"{path}: {error}") from None
    if picture.size != (width, height) and not resize:
        got = f"{path} has {picture.width} × {picture.height} pixels"
        raise InvalidArgumentError(
            f"{got}, the model takes {width} × {height}: pass --resize to fit it"
        )
    pixels = np.asarray(ImageOps.fit(picture, (width, height)))
    return pixels.reshape(height, width, channels).transpose(2, 0, 1)[None]


def read_numbers(path: Path) -> npt.NDArray[Any]:
    """Return the array of a ``.npy`` file; one that holds objects is not read.

    Raises:
        InvalidArgumentError: It is no such file.
    """
    try:
        with path.open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except ValueError as error:
        raise InvalidArgumentError(f"{path}: expected an array in .npy: {error}") from None


def check_target(path: Path | None) -> None:
    """Check that a picture can be written there, before long work for it begins.

    Raises:
        InvalidArgumentError: Its folder is missing, or its suffix names no picture format.
    """
    if path is None:
        return
    if not path.parent.is_dir():
        raise InvalidArgumentError(f"{path}: expected a folder that is there")
    if path.suffix.lower() not in Image.registered_extensions():
        raise InvalidArgumentError(f"{path}: expected a name such as out.png")


def write(path: Path, image: Images) -> None:
    """Write ``image`` [C, H, W] as a picture, clipped to [-1, 1].

    Raises:
        InvalidArgumentError: The file's suffix names no picture format.
    """
    _save(_picture(image), path)


def write_score(path: Path, score: Images) -> None:
    """Write ``score`` [B, C, H, W]: exactly to ``.npy``, else its first image as a symmetric map.

    In the map mid-grey is 0, and black and white are minus and plus the largest magnitude.
    """
    if path.suffix == ".npy":
        np.save(path, score)
    else:
        write(path, score[0] / max(float(np.abs(score[0]).max()), np.finfo(np.float32).tiny))


def write_grid(path: Path, images: Images) -> None:
    """Write ``images`` [B, C, H, W] in rows of one picture, about as wide as high."""
    _save(_grid(images), path)


def write_gif(path: Path, steps: Sequence[Images]) -> None:
    """Write one frame for each of ``steps`` [B, C, H, W], in a loop that rests on the last."""
    frames = [_grid(images) for images in steps]
    durations = [_GIF_MS] * (len(frames) - 1) + [_GIF_LAST_MS]
    _save(
        frames[0],
        path,
        format="GIF",
        save_all=True,
        append_images=frames[1:],
        duration=durations,
        loop=0,
    )


def _grid(images: Images) -> Image.Image:
    count, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    tiles = np.full((rows * columns, channels, height, width), -1.0, np.float32)
    tiles[:count] = images
    tiles = tiles.reshape(rows, columns, channels, height, width).transpose(2, 0, 3, 1, 4)
    grid = _picture(tiles.reshape(channels, rows * height, columns * width))
    factor = max(1, _TILE_SIDE // max(height, width))
    return ImageOps.scale(grid, factor, Image.Resampling.NEAREST)


def _picture(image: Images) -> Image.Image:
    pixels = np.clip(np.rint((image + 1) * 127.5), 0, 255).astype(np.uint8)
    if len(pixels) not in _MODES:
        raise InvalidArgumentError(f"pictures have 1 or 3 channels, the model {len(pixels)}")
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def _save(picture: Image.Image, path: Path, **options: Any) -> None:
    try:
        picture.save(path, **options)
    except ValueError:
        raise InvalidArgumentError(f"{path}: expected a name such as out.png") from None
