"""Conversion of pictures to 8-bit grey or RGB where Pillow does it faithfully.

Palettes and opaque alpha channels are exact, 16-bit grey is rounded, 16-bit colour is cut to the
upper byte, less than one of 255 levels. CMYK is not converted: its colours are those of a printer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from els_service.denoisers.pictures import bits_of, opened, refusing

_TIFF_PLANES = 284  # the tag PlanarConfiguration
_ALPHA = ("LA", "PA", "RGBA")
_OPAQUE = 255


def converted_picture(file: Path) -> tuple[Image.Image, str] | None:
    """Return a picture in 8-bit grey or RGB, upright, and what was converted.

    None for a picture that ``read_picture`` takes as it is, and for one that cannot be converted.

    Raises:
        LoadError: The file is damaged, or no picture; names it.
    """
    with refusing(file), opened(file) as picture:
        # Known until the pixels are read.
        bits, mode = bits_of(picture), picture.mode
        if not _is_faithful(picture, bits) or (mode in ("L", "RGB") and bits <= 8):
            return None
        if mode in _ALPHA and np.asarray(picture.convert("RGBA").getchannel("A")).min() < _OPAQUE:
            return None
        upright = ImageOps.exif_transpose(picture)
        if mode.startswith("I"):
            values = np.asarray(upright).astype(np.uint32)
            upright = Image.fromarray(((values + 128) // 257).astype(np.uint8))
        what = f"{bits} bits a channel" if bits > 8 else f"mode {mode}"
        return upright.convert("L" if upright.mode in ("1", "L", "LA") else "RGB"), what


def _is_faithful(picture: Image.Image, bits: int) -> bool:
    """Return whether Pillow's conversion loses at most the lower bits of a channel."""
    if getattr(picture, "n_frames", 1) > 1:
        return False
    if picture.mode in _ALPHA:
        return bits <= 16
    tags: Any = getattr(picture, "tag_v2", {})
    # Of deep channels that are stored one after the other Pillow takes bytes for pixels.
    has_planes = tags.get(_TIFF_PLANES, 1) != 1
    deep = 8 < bits <= 16 and not has_planes
    plain = picture.mode in ("1", "P", "L", "RGB") and (bits <= 8 or deep)
    return (plain or (picture.mode.startswith("I") and deep)) and not picture.has_transparency_data
