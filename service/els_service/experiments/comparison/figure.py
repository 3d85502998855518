"""Figure of a comparison: one row for the noise, the network and every machine."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from torch import Tensor

_GAP = 2
_MARGIN = 100
"""Width in pixels of the column of row names."""
_CELL = 56
"""Minimum pixels of a cell, whose size is an integer multiple of the image's."""


def draw_figure(rows: Mapping[str, Tensor]) -> bytes:
    """Return a PNG.

    Args:
        rows: name → images [N, C, H, W] of one shape, from -1 (black) to 1; of images without
            three channels the first channel is shown.

    Raises:
        ValueError: No rows.
    """
    if not rows:
        raise ValueError("expected at least one row, got none")
    count, _, height, width = next(iter(rows.values())).shape
    scale = -(-_CELL // max(height, width))
    # Size of the whole figure; cells are pasted one by one.
    right, bottom = cell_corner(len(rows), count, height, width)
    figure = Image.new("RGB", (right, bottom), "white")
    pen = ImageDraw.Draw(figure)
    for row, (name, images) in enumerate(rows.items()):
        pen.text((4, cell_corner(row, 0, height, width)[1] + _CELL // 2 - 6), name, fill="black")
        for column, image in enumerate(images):
            picture = Image.fromarray(_pixels(image)).convert("RGB")
            enlarged = picture.resize((width * scale, height * scale), Image.Resampling.NEAREST)
            figure.paste(enlarged, cell_corner(row, column, height, width))
    buffer = io.BytesIO()
    figure.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def cell_corner(row: int, column: int, height: int, width: int) -> tuple[int, int]:
    """Return left and upper pixel of a cell for images of this size."""
    scale = -(-_CELL // max(height, width))
    return (
        _MARGIN + column * (width * scale + _GAP),
        _GAP + row * (height * scale + _GAP),
    )


def _pixels(image: Tensor) -> npt.NDArray[np.uint8]:
    shown = image if len(image) == 3 else image[:1]
    levels = shown.double().add(1).mul(127.5).round().clamp(0, 255).byte()
    pixels: npt.NDArray[np.uint8] = levels.permute(1, 2, 0).numpy()
    return pixels if pixels.shape[2] == 3 else pixels[:, :, 0]
