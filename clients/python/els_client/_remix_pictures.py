"""Pictures of ``els remix``: previews of all scales, and where each pixel came from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from els_client import _pictures as pictures
from els_client._explain_pictures import FAINT, INK, PAPER, Rgb
from els_client._types import Images

GAP, MARGIN = 12, 14
"""Pixels between the pictures of a sheet, and around them."""
_CAPTION = 34
_CORNERS = np.array(
    [[(0.13, 0.20, 0.72), (0.10, 0.80, 0.86)], [(0.93, 0.23, 0.25), (0.99, 0.90, 0.22)]]
)
"""Colours of the corners of a photograph: left and right of its top, of its bottom."""
_TOP, _DETAIL = 13, 11


def enlarged(images: Images, size: tuple[int, int]) -> Images:
    """Return images [B, C, h, w] at (height, width), each pixel as a rectangle."""
    rows, cols = (
        np.arange(side) * own // side for side, own in zip(size, images.shape[2:], strict=True)
    )
    return images[:, :, rows][..., cols]


def coordinate_colours(
    rows: npt.NDArray[np.integer], cols: npt.NDArray[np.integer], size: tuple[int, int]
) -> Rgb:
    """Return the colours of places in a photograph, uint8 [H, W, 3], black where there is none.

    Blue, cyan, red and yellow are its corners, and other places lie between them, so that colours
    change smoothly where neighbours of a picture come from neighbours of the photograph.

    Args:
        rows: Row of each pixel's source, [H, W]; -1 for none.
        cols: Its column.
        size: Height and width of the photograph.
    """
    down = rows / max(size[0] - 1, 1)
    right = cols / max(size[1] - 1, 1)
    weights = np.stack(
        [(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right]
    )
    colours = np.tensordot(weights, _CORNERS.reshape(4, 3), (0, 0))
    colours[(rows < 0) | (cols < 0)] = 0
    pixels: Rgb = np.rint(255 * colours.clip(0, 1)).astype(np.uint8)
    return pixels


def sources_sheet(
    results: Images,
    places: npt.NDArray[np.integer],
    photographs: Sequence[Images],
) -> Image.Image:
    """Return each result beside its mosaic, and below them the photograph and its colours.

    Args:
        results: Pictures [B, C, H, W].
        places: Photograph, row and column of the source of each pixel, [B, H, W, 3]; -1 for none.
        photographs: Of the model, at the size in which ``places`` are, each [C, h, w].
    """
    rows: list[list[tuple[Image.Image, str, str]]] = []
    for number, (result, source) in enumerate(zip(results, places, strict=True)):
        mosaic = np.zeros((*source.shape[:2], 3), np.uint8)
        for index, photograph in enumerate(photographs):
            size = photograph.shape[1], photograph.shape[2]
            own = source[..., 0] == index
            colours = coordinate_colours(source[..., 1], source[..., 2], size)
            mosaic[own] = colours[own]
        rows.append(
            [
                (pictures.to_picture(result).convert("RGB"), f"picture {number}", ""),
                (Image.fromarray(mosaic), "its sources", "colour: place in the photograph"),
            ]
        )
    for photograph in photographs:
        height, width = photograph.shape[1:]
        down, right = np.indices((height, width))
        colours = coordinate_colours(down, right, (height, width))
        rows.append(
            [
                (pictures.to_picture(photograph).convert("RGB"), "photograph", ""),
                (Image.fromarray(colours), "its places", "smooth: whole parts of it"),
            ]
        )
    return _table(rows)


def _table(rows: Sequence[Sequence[tuple[Image.Image, str, str]]]) -> Image.Image:
    """Return pictures in rows, each above its title and detail."""
    factor = max(1, 192 // max(max(picture.size) for row in rows for picture, _, _ in row))
    tiles = [
        [
            (
                picture.resize(
                    (factor * picture.width, factor * picture.height), Image.Resampling.NEAREST
                ),
                title,
                detail,
            )
            for picture, title, detail in row
        ]
        for row in rows
    ]
    large, small = ImageFont.load_default(_TOP), ImageFont.load_default(_DETAIL)
    widths = [
        math.ceil(
            max(
                max(picture.width, large.getlength(title), small.getlength(detail))
                for picture, title, detail in column
            )
        )
        for column in zip(*tiles, strict=True)
    ]
    heights = [max(tile[0].height for tile in row) + _CAPTION + GAP for row in tiles]
    size = sum(widths) + GAP * (len(widths) - 1) + 2 * MARGIN, sum(heights) + 2 * MARGIN - GAP
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    top = MARGIN
    for row, height in zip(tiles, heights, strict=True):
        left = MARGIN
        for (picture, title, detail), width in zip(row, widths, strict=True):
            sheet.paste(picture, (left, top))
            below = top + picture.height
            pen.text((left, below + 3), title, INK, large)
            pen.text((left, below + 19), detail, FAINT, small)
            left += width + GAP
        top += height
    return sheet
