"""Reader of picture files whose pixels have one unambiguous meaning.

No image format is read for which Pillow runs another program.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from els_service.errors import LoadError

IMAGE_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 1 << 26
"""Maximum height × width of a picture: a file of a few KiB may declare gigabytes."""

_TIFF_BITS = 258  # the tag BitsPerSample
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_FLATTEN = "flatten it onto a background, as RGB without transparency"


def read_picture(file: Path) -> NDArray[np.uint8]:
    """Return one picture, [H, W, C], grey or RGB, rotated by its EXIF orientation.

    Of a multi-picture JPEG file (MPO) the first picture is read.

    Raises:
        LoadError: The file is damaged or not in ``IMAGE_FORMATS``, has several frames,
            transparency, more than 8 bits a channel, another mode than L or RGB, or more than
            ``MAX_PIXELS``; names the file.
    """
    with refusing(file), opened(file) as picture:
        return _pixels(file, picture)


def decode_picture(data: bytes, name: str) -> NDArray[np.uint8]:
    """Return the picture in the bytes of a file, as ``read_picture``; errors have the name."""
    with refusing(name), opened(name, io.BytesIO(data)) as picture:
        return _pixels(name, picture)


def _pixels(file: Path | str, picture: Image.Image) -> NDArray[np.uint8]:
    _check(file, picture)
    pixels = np.asarray(ImageOps.exif_transpose(picture))
    return pixels.reshape(*pixels.shape[:2], -1)


@contextmanager
def refusing(path: Path | str) -> Iterator[None]:
    """Convert any exception of reading a damaged file to a LoadError that names the file.

    A pipe, socket or device is rejected before it is opened, which could wait for ever. A text is
    the name of a part of a file.
    """
    try:
        special = isinstance(path, Path) and path.exists() and not path.is_file()
        if special and not Path(path).is_dir():
            raise LoadError(path, "expected a file, got a pipe, socket or device")
        yield
    except LoadError:
        raise
    except Exception as error:
        # A list of all exceptions of the many decoders would not be complete.
        reason = getattr(error, "strerror", None) or error
        raise LoadError(path, f"cannot be read: {reason}") from error


@contextmanager
def opened(file: Path | str, content: BinaryIO | None = None) -> Iterator[Image.Image]:
    """Yield a picture with only its header read; raises LoadError if it is too large.

    Args:
        file: the file, or a name for errors if the content is given.
        content: bytes of the picture.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            picture = Image.open(content or file, formats=IMAGE_FORMATS)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise LoadError(file, f"expected at most {MAX_PIXELS} pixels, got more") from None
        except UnidentifiedImageError:
            expected = f"expected one of {', '.join(IMAGE_FORMATS)}"
            raise LoadError(file, f"cannot be read: cannot identify image; {expected}") from None
    with picture:
        if (pixels := picture.width * picture.height) > MAX_PIXELS:
            raise LoadError(file, f"expected at most {MAX_PIXELS} pixels, got {pixels}")
        yield picture


def _check(file: Path | str, picture: Image.Image) -> None:
    if picture.format != "MPO" and getattr(picture, "n_frames", 1) > 1:
        expected = "expected one frame: save the one that is meant as a file of its own"
        raise LoadError(file, f"{expected}, got {getattr(picture, 'n_frames', 1)}")
    if picture.mode in (*_ALPHA, "L", "RGB") and (bits := bits_of(picture)) > 8:
        raise LoadError(file, f"expected 8 bits a channel, got {bits}: convert it")
    if picture.mode not in ("L", "RGB"):
        # No silent conversion: transparency and palettes are ambiguous in [−1, 1].
        remedy = _FLATTEN if picture.mode in _ALPHA else "convert it"
        mode = f"mode {picture.mode}, expected L (8-bit grey) or RGB"
        raise LoadError(file, f"{mode}: {remedy}")
    if picture.has_transparency_data:
        raise LoadError(file, f"expected no transparent colour, got one: {_FLATTEN}")


def bits_of(picture: Image.Image) -> int:
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
