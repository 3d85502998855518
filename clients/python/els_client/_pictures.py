"""Conversion between arrays [C, H, W] in [-1, 1] and files: PNG, GIF, npy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from els_client._models import Sizes
from els_client._types import Images
from els_client.errors import InvalidArgumentError

_MODES = {1: "L", 3: "RGB"}
# Grids and GIFs enlarge small images to about this side, by integer factors.
_TILE_SIDE = 112
_GIF_MS = 100
_GIF_LAST_MS = 1500
MAX_PIXELS = 1 << 26
"""Maximum height × width of a picture: a file of a few KiB may declare gigabytes."""
_OPAQUE = 255
_TIFF_BITS, _TIFF_PLANES = 258, 284  # the tags BitsPerSample, PlanarConfiguration
_ORIENTATION = 0x0112  # the EXIF tag
_SIDEWAYS = (5, 6, 7, 8)
"""Orientations whose height and width change places."""
READ_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Formats whose depth is known: Pillow cuts others, such as JPEG 2000, to 8 bits, or runs another
program on them."""
_WRITTEN_FORMATS = (*READ_FORMATS, "JPEG2000", "PDF", "TGA")


def read(
    path: Path, shape: tuple[int, int, int], *, resize: bool, sizes: Sizes | None = None
) -> npt.NDArray[np.uint8]:
    """Return the picture as uint8 [1, C, H, W], grey or RGB as ``shape`` (C, H, W) asks.

    Args:
        path: Picture, as in ``opened``.
        shape: Shape of the model's images.
        resize: Whether to crop to the model's aspect ratio about the centre and scale to fit.
        sizes: Sizes that the model answers; such a picture keeps its size without ``resize``.

    Raises:
        InvalidArgumentError: Not such a picture, or of another size without ``resize``.
    """
    channels, height, width = shape
    check_channels(channels)
    picture = opened(path).convert(_MODES[channels])
    if sizes is not None and not resize and (picture.height, picture.width) in sizes:
        width, height = picture.size
    if picture.size != (width, height) and not resize:
        got = f"{path} has {picture.width} × {picture.height} pixels"
        raise InvalidArgumentError(
            f"{got}, the model takes {width} × {height}: pass --resize to fit it"
        )
    pixels = np.asarray(ImageOps.fit(picture, (width, height)))
    return pixels.reshape(height, width, channels).transpose(2, 0, 1)[None]


def opened(path: Path, converted: Callable[[str], None] | None = None) -> Image.Image:
    """Return a picture in grey or RGB, rotated by its EXIF orientation.

    Of a multi-picture JPEG file (MPO) the first picture is read.

    Args:
        path: Picture with 8 bits per channel, one frame, no transparency, at most ``MAX_PIXELS``.
        converted: Callback with the text that a picture of up to 16 bits was reduced to 8; None
            rejects it.

    Raises:
        InvalidArgumentError: Not such a picture.
    """
    with _refusing(path), _opened(path) as source:
        bits = _check(path, source, deep=converted is not None)
        upright = eight_bits(ImageOps.exif_transpose(source))
        if converted and bits > 8:
            converted(f"{path}: reduced from {bits} bits a channel to 8")
        return upright.convert("L" if upright.mode in ("1", "L", "LA") else "RGB")


def size_of(path: Path) -> tuple[int, int]:
    """Return height and width of a picture as it is shown, from its header alone.

    Raises:
        InvalidArgumentError: Not a picture, or one with more than ``MAX_PIXELS``.
    """
    with _refusing(path), _opened(path) as source:
        turned = source.getexif().get(_ORIENTATION, 1) in _SIDEWAYS
        return source.size if turned else source.size[::-1]


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Convert any exception of reading a damaged picture to an error that names the file."""
    try:
        yield
    except InvalidArgumentError:
        raise
    except (UnidentifiedImageError, SyntaxError):
        expected = ", ".join(READ_FORMATS)
        raise InvalidArgumentError(f"{path}: not a picture in one of {expected}") from None
    except Exception as error:
        # A list of all exceptions of the many decoders would not be complete.
        raise InvalidArgumentError(f"{path}: {error}") from None


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Yield a picture with only its header read; raises an error if it is too large."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            picture = Image.open(path, formats=READ_FORMATS)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise InvalidArgumentError(
                f"{path}: expected at most {MAX_PIXELS} pixels, got more"
            ) from None
    with picture:
        if (pixels := picture.width * picture.height) > MAX_PIXELS:
            raise InvalidArgumentError(
                f"{path}: expected at most {MAX_PIXELS} pixels, got {pixels}"
            )
        yield picture


def _check(path: Path, picture: Image.Image, *, deep: bool) -> int:
    """Return the bits a channel of a picture that can be read; others are rejected."""
    if picture.mode == "CMYK":
        # Its colours are those of a printer, which Pillow's formula for RGB does not know.
        raise InvalidArgumentError(f"{path}: expected grey or RGB, got CMYK: convert it")
    bits = _bits(picture)  # Known until the pixels are read.
    readable = deep and bits <= 16 and picture.mode != "F" and not _has_planes(picture)
    if picture.mode.startswith(("I", "F")) and not readable:
        raise InvalidArgumentError(f"{path}: expected 8 bits a channel, got {picture.mode}")
    if bits > 8 and not readable:
        raise InvalidArgumentError(f"{path}: expected 8 bits a channel, got {bits}: convert it")
    frames = getattr(picture, "n_frames", 1)
    if picture.format != "MPO" and frames > 1:
        raise InvalidArgumentError(
            f"{path}: expected one frame, got {frames}: save the one that is meant as a picture"
        )
    if picture.has_transparency_data:
        # The background is not in the file; a fully opaque alpha channel is allowed. A transparent
        # colour of a grey or RGB file is not: in one of 1, 2 or 4 bits Pillow does not find it.
        has_key = picture.mode in ("1", "L", "RGB")
        if has_key or np.asarray(picture.convert("RGBA").getchannel("A")).min() < _OPAQUE:
            raise InvalidArgumentError(
                f"{path}: expected no transparency, got some: flatten it onto a background"
            )
    return bits


def _bits(picture: Image.Image) -> int:
    """Return the bits a channel in the file: Pillow cuts deep colour to 8 without a warning."""
    tags: Any = getattr(picture, "tag_v2", {})
    if _TIFF_BITS in tags:
        return int(max(tags[_TIFF_BITS]))
    tiles: Any = getattr(picture, "tile", ())
    for codec, _, _, details in tiles:
        arguments = details if isinstance(details, tuple) else (details,)
        if any(";16" in one for one in arguments if isinstance(one, str)):
            return 16
        if codec.startswith("ppm"):
            # The largest number of a pixel; a plain bitmap has none.
            return max((one.bit_length() for one in arguments if isinstance(one, int)), default=1)
    return 8


def _has_planes(picture: Image.Image) -> bool:
    """Return whether a TIFF stores its channels one after the other: Pillow misreads deep ones."""
    tags: Any = getattr(picture, "tag_v2", {})
    return bool(tags.get(_TIFF_PLANES, 1) != 1)


def eight_bits(picture: Image.Image) -> Image.Image:
    """Return a grey picture of 16 bits rounded to 8; others, which Pillow has cut, as they are."""
    if not picture.mode.startswith("I"):
        return picture
    values = np.asarray(picture).astype(np.uint32)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def read_numbers(path: Path) -> npt.NDArray[Any]:
    """Return the array of a ``.npy`` file; object arrays are rejected.

    Raises:
        InvalidArgumentError: Not such a file.
    """
    try:
        with path.open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, MemoryError) as error:
        # A header may declare any size.
        raise InvalidArgumentError(f"{path}: expected an array in .npy: {error}") from None


def check_target(path: Path | None, *, also: str = "") -> None:
    """Check that a picture can be written to a path, before a long computation.

    Args:
        path: Of the picture; None if there is none.
        also: A further suffix that is allowed.

    Raises:
        InvalidArgumentError: The folder is missing, or the suffix is not of a picture format.
    """
    if path is None:
        return
    if not path.parent.is_dir():
        raise InvalidArgumentError(f"{path}: expected an existing folder")
    format = Image.registered_extensions().get(path.suffix.lower())
    if path.suffix != (also or None) and format not in _WRITTEN_FORMATS:
        raise InvalidArgumentError(f"{path}: expected a name such as out{also or '.png'}")


def check_channels(channels: int) -> None:
    """Check that pictures have so many channels.

    Raises:
        InvalidArgumentError: Neither 1 nor 3.
    """
    if channels not in _MODES:
        raise InvalidArgumentError(f"pictures have 1 or 3 channels, the model {channels}")


def write(path: Path, image: Images) -> None:
    """Write ``image`` [C, H, W] as a picture, clipped to [-1, 1].

    Raises:
        InvalidArgumentError: The suffix is not of a picture format.
    """
    save(to_picture(image), path)


def write_score(path: Path, score: Images) -> None:
    """Write ``score`` [B, C, H, W]: all of it to ``.npy``, otherwise a map of its first image.

    In the map mid-grey is 0; black and white are minus and plus the largest magnitude.
    """
    if path.suffix == ".npy":
        np.save(path, score)
    else:
        write(path, score[0] / max(float(np.abs(score[0]).max()), np.finfo(np.float32).tiny))


def write_grid(path: Path, images: Images) -> None:
    """Write ``images`` [B, C, H, W] as a roughly square grid."""
    save(_grid(images), path)


def write_gif(path: Path, steps: Sequence[Images]) -> None:
    """Write one frame for each of ``steps`` [B, C, H, W], in a loop that pauses on the last."""
    frames = [_grid(images) for images in steps]
    durations = [_GIF_MS] * (len(frames) - 1) + [_GIF_LAST_MS]
    save(
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
    grid = to_picture(tiles.reshape(channels, rows * height, columns * width))
    factor = max(1, _TILE_SIDE // max(height, width))
    return ImageOps.scale(grid, factor, Image.Resampling.NEAREST)


def to_picture(image: Images) -> Image.Image:
    """Return ``image`` [C, H, W], clipped to [-1, 1], as grey or RGB.

    Raises:
        InvalidArgumentError: It has neither 1 nor 3 channels.
    """
    pixels = np.clip(np.rint((image + 1) * 127.5), 0, 255).astype(np.uint8)
    check_channels(len(pixels))
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def save(picture: Image.Image, path: Path, **options: Any) -> None:
    """Write a picture in the format of the path's suffix.

    Raises:
        InvalidArgumentError: The suffix is not of a picture format.
    """
    try:
        picture.save(path, **options)
    except ValueError:
        raise InvalidArgumentError(f"{path}: expected a name such as out.png") from None
