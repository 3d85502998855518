"""Pictures and masks of ``remix``: from arrays and Pillow's to those of a request."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from els_client import _codec as codec
from els_client._types import Pixels

Picture: TypeAlias = Image.Image | Pixels
"""Picture of Pillow in grey or RGB; bytes [H, W] or [H, W, 3]; or floats [C, H, W] in [-1, 1]."""
Size: TypeAlias = tuple[int, int]
"""Height and width in pixels."""

_MODES = {1: "L", 3: "RGB"}
_SHAPES = "uint8 of shape [H, W] or [H, W, 3], floats of shape [C, H, W], or a picture of Pillow"
_HALF = 128
"""Least value of a mask's byte that is drawn, in a picture of Pillow."""


def pixels_of(field: str, given: Picture, channels: int) -> npt.NDArray[Any]:
    """Return a picture as uint8 or floats [C, H, W], with the channels of a model.

    Raises:
        InvalidArgumentError: It is no picture, has transparency or more than 8 bits a channel, or
            other channels.
    """
    if channels not in _MODES:
        codec.refuse(field, f"none, as the model has {channels} channels", "a picture")
    if isinstance(given, Image.Image):
        if given.mode not in _MODES.values() or given.has_transparency_data:
            codec.refuse(field, "a picture of mode L or RGB, without transparency", given.mode)
        return _planar(ImageOps.exif_transpose(given).convert(_MODES[channels]))
    array = codec.array_of(field, given)
    if array.dtype.type is np.uint8:
        if array.ndim == 3 and array.shape[2] == 1:
            array = array[..., 0]
        if array.ndim != 2 and (array.ndim != 3 or array.shape[2] != 3):
            codec.refuse(field, _SHAPES, f"uint8 of shape {list(array.shape)}")
        return _planar(Image.fromarray(array).convert(_MODES[channels]))
    if array.dtype.kind != "f" or array.ndim != 3:
        codec.refuse(field, _SHAPES, f"{array.dtype} of shape {list(array.shape)}")
    if len(array) != channels:
        codec.refuse(field, f"{channels} channels, those of the model", len(array))
    return array.astype(np.float32)


def mask_of(given: Picture) -> npt.NDArray[np.bool_]:
    """Return which pixels are drawn, [H, W].

    Args:
        given: Numbers or booleans [H, W], where others than 0 are drawn; or a picture of Pillow,
            whose lighter half of the grey values is drawn.

    Raises:
        InvalidArgumentError: It has another shape, or no pixel is drawn.
    """
    if isinstance(given, Image.Image):
        drawn = np.asarray(given.convert("L")) >= _HALF
    else:
        array = codec.array_of("mask", given)
        if array.ndim != 2:
            codec.refuse("mask", "shape [H, W]", f"shape {list(array.shape)}")
        drawn = array != 0
    if not drawn.any():
        codec.refuse("mask", "pixels to draw (other than 0, or white)", "none")
    return drawn


def resized(pixels: npt.NDArray[Any], size: Size, *, stretch: bool = False) -> npt.NDArray[Any]:
    """Return a picture [C, H, W] of another size and its dtype; unchanged if it has that size.

    It is cropped about its centre to the proportions of the size, or stretched to them.
    """
    if pixels.shape[1:] == size:
        return pixels
    if pixels.dtype == np.uint8:
        picture = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
        return _planar(_fitted(picture, size, stretch))
    planes = [np.asarray(_fitted(Image.fromarray(plane), size, stretch)) for plane in pixels]
    return np.stack(planes)


def resized_mask(drawn: npt.NDArray[np.bool_], size: Size) -> npt.NDArray[np.bool_]:
    """Return a mask [H, W] of another size, cropped as ``resized`` does."""
    if drawn.shape == size:
        return drawn
    picture = Image.fromarray(drawn.astype(np.uint8) * 255)
    return np.asarray(ImageOps.fit(picture, size[::-1], Image.Resampling.NEAREST)) > 0


def _fitted(picture: Image.Image, size: Size, stretch: bool) -> Image.Image:
    across = size[1], size[0]
    return picture.resize(across) if stretch else ImageOps.fit(picture, across)


def _planar(picture: Image.Image) -> npt.NDArray[np.uint8]:
    """Return a picture in grey or RGB as [C, H, W]."""
    pixels = np.asarray(picture)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
