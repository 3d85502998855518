"""Pictures of an explanation: maps of its pixels, and a sheet with the bank images it took from."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from els_client import _pictures as pictures
from els_client._explanation import Explanation
from els_client._types import Images

Mask = npt.NDArray[np.bool_]
Rgb = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]
Panel = tuple[Image.Image, str, str, Colour]
"""Picture, title, detail, and colour of the title."""

SHOWN = 8
"""Bank images on a sheet."""
PALETTE: tuple[Colour, ...] = (
    *((255, 166, 43), (76, 190, 255), (64, 214, 140), (250, 230, 90)),
    *((255, 107, 107), (150, 140, 255), (240, 140, 215), (60, 215, 205)),
)
"""Colours of the bank images of a sheet, by falling share."""
PAPER, INK, FAINT = (13, 17, 23), (230, 237, 243), (139, 148, 158)
_OTHERS = (0.45, 0.5)
"""Saturation and value of the colours of all other bank images."""
_UNSURE = 0.25
"""Brightness of a mosaic's pixel whose largest source weighs nothing; that of weight 1 is 1."""
LEAST_WEIGHT = 0.01
"""Weight below which the largest source of a pixel is one of many, and outlined nowhere."""
# Anchors of matplotlib's inferno, which is perceptually uniform.
_INFERNO = np.array(
    [
        *((0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85)),
        *((227, 89, 51), (249, 140, 10), (249, 201, 50), (252, 255, 164)),
    ],
    np.float64,
)
_SIDE = 168
"""Small images are enlarged to about this side, by an integer factor."""
_COLUMNS, _GAP, _MARGIN, _LINE = 4, 14, 18, 16
_DIMMED = 0.4
"""Brightness of what was not taken from a bank image."""


@dataclass(frozen=True)
class Taken:
    """Part of one result that comes from one bank image.

    Attributes:
        image: Number in the bank.
        share: Share of the image in the result.
        pixels: Pixels of the result whose source of largest weight is in the image, and weighs at
            least ``LEAST_WEIGHT``, [H, W].
        places: These sources in the bank image, [H, W].
        values: Bank image, float32 [C, H, W].
        label: Name or number of its label; empty for an unlabelled bank.
        file: Name of its file; empty if it is not known.
    """

    image: int
    share: float
    pixels: Mask
    places: Mask
    values: Images
    label: str
    file: str


def taken_from(found: Explanation, index: int = 0) -> list[Taken]:
    """Return the parts of a result by bank image in ``found.images``, in order of falling share."""
    largest = found.sources[index, :, :, 0]
    clear = found.weights[index, :, :, 0] >= LEAST_WEIGHT
    taken = []
    for image, values in found.images[index].items():
        pixels = clear & (largest[..., 0] == image)
        places = np.zeros(values.shape[1:], np.bool_)
        places[tuple(largest[pixels][:, 1:].T)] = True
        label = int(found.labels[image])
        name = found.label_names[label] if found.label_names else str(label)
        share = float(found.shares[index, image])
        file = found.file_names.get(image, "")
        label_text = name if label >= 0 else ""
        taken.append(Taken(image, share, pixels, places, values, label_text, file))
    return taken


def mosaic(found: Explanation, index: int = 0) -> Rgb:
    """Return [H, W, 3]: each pixel in the colour of the bank image of its largest source.

    The images of largest share have the colours of ``PALETTE``, all others paler ones. A pixel is
    the darker, the less its largest source weighs.
    """
    images = found.sources[index, :, :, 0, 0]
    colours = np.zeros((*images.shape, 3))
    for image in np.unique(images).tolist():
        # Neighbouring numbers get different hues: a multiplicative hash, Knuth's.
        hue = image * 2654435761 % 2**32 / 2**32
        colours[images == image] = 255 * np.array(colorsys.hsv_to_rgb(hue, *_OTHERS))
    for image, colour in zip(_ranked(found, index), PALETTE, strict=False):
        colours[images == image] = colour
    weight = found.weights[index, :, :, 0]
    colours *= (_UNSURE + (1 - _UNSURE) * np.sqrt(weight))[..., None]
    pixels: Rgb = np.rint(colours).clip(0, 255).astype(np.uint8)
    return pixels


def displacement(found: Explanation, index: int = 0, *, wraps: bool = False) -> Rgb:
    """Return [H, W, 3]: from where each pixel's largest source was moved.

    White is the same place; hue is the direction, saturation the distance in units of the largest.

    Args:
        found: Explanation.
        index: Of the result.
        wraps: Whether images continue at the opposite border, so that distances are at most half a
            side of the bank image.
    """
    sources = found.sources[index, :, :, 0, 1:]
    height, width = sources.shape[:2]
    places = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1)
    moved = (sources - places).astype(np.float64)
    if wraps:
        sides = np.broadcast_to([height, width], moved.shape)
        if len(found.image_sizes):
            known = found.image_sizes[found.sources[index, :, :, 0, 0]]
            sides = np.where(known > 0, known, sides)
        moved = (moved + sides // 2) % sides - sides // 2
    distance = np.hypot(moved[..., 0], moved[..., 1])
    saturation = distance / max(float(distance.max()), 1.0)
    hue = np.arctan2(moved[..., 0], moved[..., 1]) / (2 * np.pi) % 1
    pairs = zip(hue.ravel().tolist(), saturation.ravel().tolist(), strict=True)
    rgb = np.array([colorsys.hsv_to_rgb(h, s, 1.0) for h, s in pairs])
    pixels: Rgb = np.rint(255 * rgb).astype(np.uint8).reshape(height, width, 3)
    return pixels


def entropy(found: Explanation, index: int = 0) -> Rgb:
    """Return [H, W, 3]: entropy of each pixel, from black, 0, to pale yellow, the largest."""
    values = found.entropy[index]
    position = values / max(float(values.max()), np.finfo(np.float32).tiny) * (len(_INFERNO) - 1)
    anchors = np.arange(len(_INFERNO))
    channels = [np.interp(position, anchors, _INFERNO[:, c]) for c in range(3)]
    pixels: Rgb = np.rint(np.stack(channels, -1)).astype(np.uint8)
    return pixels


def enlarged(pixels: Rgb) -> Image.Image:
    """Return a map [H, W, 3] as a picture of about ``_SIDE``, or its own size if that is more."""
    return _enlarged(Image.fromarray(pixels))


def enlarged_picture(image: Images) -> Image.Image:
    """Return an image [C, H, W] as a picture in RGB of about ``_SIDE``."""
    return _enlarged(pictures.to_picture(image)).convert("RGB")


def sheet(found: Explanation, index: int = 0, *, wraps: bool = False) -> Image.Image:
    """Return one picture of a result, its maps, and the bank images that it took most from.

    Outlines in a bank image surround the places of the largest sources of some pixels; outlines of
    the same colour in the result surround these pixels.
    """
    taken = taken_from(found, index)[:SHOWN]
    picture = _enlarged(pictures.to_picture(found.denoised[index])).convert("RGB")
    # Largest last: small regions inside others stay visible below it.
    for one, colour in reversed(list(zip(taken, PALETTE, strict=False))):
        picture = _outlined(picture, one.pixels, colour)
    largest = float(found.entropy[index].max())
    panels: list[Panel] = [
        (picture, "this picture", "", INK),
        (enlarged(mosaic(found, index)), "source images", "dark: no clear source", INK),
        (enlarged(displacement(found, index, wraps=wraps)), "displacement", "white: none", INK),
        (enlarged(entropy(found, index)), "entropy", f"yellow: {largest:.2g} nats", INK),
    ]
    for one, colour in zip(taken, PALETTE, strict=False):
        title = f"{100 * one.share:.1f} % {one.label}".rstrip()
        panels.append((_region(one, colour), title, one.file or f"image {one.image}", colour))
    return arranged(panels)


def _region(one: Taken, colour: Colour) -> Image.Image:
    """Return a bank image with what was taken outlined, and the rest dimmed."""
    whole = _enlarged(pictures.to_picture(one.values)).convert("RGB")
    dimmed = whole.point(lambda value: round(_DIMMED * value))
    mask = Image.fromarray(one.places).resize(whole.size, Image.Resampling.NEAREST)
    return _outlined(Image.composite(whole, dimmed, mask), one.places, colour)


def arranged(panels: Sequence[Panel]) -> Image.Image:
    """Return panels in rows, each above its two lines of text."""
    sizes = [panel.size for panel, *_ in panels]
    width, height = (max(sides) for sides in zip(*sizes, strict=True))
    across, down = width + _GAP, height + 2 * _LINE + _GAP
    rows = -(-len(panels) // _COLUMNS)
    size = (_COLUMNS * across - _GAP + 2 * _MARGIN, rows * down - _GAP + 2 * _MARGIN)
    sheet = Image.new("RGB", size, PAPER)
    pen, large, small = ImageDraw.Draw(sheet), _font(13), _font(11)
    for number, (panel, title, detail, colour) in enumerate(panels):
        row, column = divmod(number, _COLUMNS)
        left, top = _MARGIN + column * across, _MARGIN + row * down
        sheet.paste(panel, (left + (width - panel.width) // 2, top))
        middle, below = left + width / 2, top + height
        pen.text((middle, below + 4), _fitted(title, large, width), colour, large, anchor="ma")
        pen.text((middle, below + 21), _fitted(detail, small, width), FAINT, small, anchor="ma")
    return sheet


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Return the text, or its end after an ellipsis if it is wider than ``width`` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"…{text}") > width:
        text = text[1:]
    return f"…{text}"


def _outlined(picture: Image.Image, mask: Mask, colour: Colour) -> Image.Image:
    """Return the picture with a line inside the border of a mask [H, W], enlarged to its size."""
    large = np.asarray(Image.fromarray(mask).resize(picture.size, Image.Resampling.NEAREST))
    inside = large
    for _ in range(2 if large.shape[0] > mask.shape[0] else 1):
        inside = _eroded(inside)
    pixels = np.array(picture)
    pixels[large & ~inside] = colour
    return Image.fromarray(pixels)


def _eroded(mask: Mask) -> Mask:
    """Return the pixels of a mask whose eight neighbours are in it, too."""
    padded = np.pad(mask, 1)
    rows = padded[:-2] & padded[1:-1] & padded[2:]
    eroded: Mask = rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]
    return eroded


def _enlarged(picture: Image.Image) -> Image.Image:
    factor = max(1, _SIDE // max(picture.size))
    size = (factor * picture.width, factor * picture.height)
    return picture.resize(size, Image.Resampling.NEAREST)


def _ranked(found: Explanation, index: int) -> list[int]:
    """Return the bank images in ``found.images``, by falling share."""
    return list(found.images[index])[:SHOWN]
