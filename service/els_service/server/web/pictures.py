"""PNG files as tensors, and tensors as PNG files."""

from __future__ import annotations

import base64
import binascii
import io
import math
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.config import Limits
from els_service.denoisers.levels import NoiseLevel
from els_service.denoisers.noise import standard_normal
from els_service.errors import ElsError, InvalidArgumentError
from els_service.server.requests.tensors import check_pixels, decode_pixels, encode_tensor
from els_service.server.web.json_values import kind_of

_MODES = {1: "L", 3: "RGB"}
"""Channels → mode of Pillow."""
_OPAQUE, _BRIGHT = 255, 128
_MAGIC = b"\x89PNG\r\n\x1a\n"
_HEAD = struct.Struct(">16xII")
"""Start of a PNG file, with width and height."""
_HEAD_TEXT = 4 * _HEAD.size // 3
"""Characters of base64 that the head takes: whole groups of four."""
_DECODED = 8
"""Bytes for each pixel while a picture is decoded: its copies of one to three channels."""
_NOISY = 48
"""Bytes for each pixel and channel with noise: five float64 copies, one float32."""
_GAP = 2
"""Pixels between the pictures of a sheet."""

Bytes = npt.NDArray[np.uint8]
Shape = tuple[int, int, int]


def tensor_of(field: str, given: Any, shape: Shape, limits: Limits, *, resize: bool) -> pb.Tensor:
    """Return the tensor [B, C, H, W] of one or several pictures, whose bytes stand for [-1, 1].

    Args:
        field: of the request.
        given: PNG files: ``bytes``, base64 text, a list of either, or ``{"png": …}`` of those.
        shape: [C, H, W] of the model.
        limits: of requests.
        resize: whether pictures of another size are resized to the model's.

    Raises:
        InvalidArgumentError: One is no PNG file in grey or RGB.
        ResourceExhaustedError: Together they are too large.
    """
    given = given["png"] if isinstance(given, dict) else given
    files = given if isinstance(given, list) else [given]
    if shape[0] not in _MODES:
        raise InvalidArgumentError(field, f"a tensor of {shape[0]} channels", "a picture")
    if not 0 < len(files) <= limits.max_images:
        raise InvalidArgumentError(field, f"1 to {limits.max_images} pictures", len(files))
    size = (shape[1], shape[2]) if resize else None
    # All before one is decoded: of a hundred bytes come a hundred thousand pixels.
    data = [_file_of(field, file) for file in files]
    sizes_given = [_HEAD.unpack_from(file) for file in data]
    check_pixels(field, shape[0] * sum(width * height for width, height in sizes_given), limits)
    pixels = [
        _pixels(field, file, shape[0], given_size, size)
        for file, given_size in zip(data, sizes_given, strict=True)
    ]
    if len({each.shape for each in pixels}) > 1:
        sizes = sorted({f"{each.shape[2]}x{each.shape[1]}" for each in pixels})
        raise InvalidArgumentError(field, "pictures of one size", ", ".join(sizes))
    stacked = np.stack(pixels)
    return pb.Tensor(dtype=pb.DTYPE_U8, shape=stacked.shape, data=stacked.tobytes())


def mask_of(field: str, given: Any, limits: Limits) -> pb.Tensor:
    """Return the mask [1, 1, H, W] of a picture: 1 where it is bright.

    Raises:
        InvalidArgumentError, ResourceExhaustedError: As ``tensor_of``.
    """
    tensor = tensor_of(field, given, (1, 0, 0), limits, resize=False)
    bright = np.frombuffer(tensor.data, np.uint8).reshape(tuple(tensor.shape)) >= _BRIGHT
    return encode_tensor(bright.astype(np.float32))


def with_noise(tensor: pb.Tensor, level: NoiseLevel, seed: int) -> pb.Tensor:
    """Return a tensor of clean images with the noise of a level: a·x0 + s·ε, float32."""
    shape = tuple(tensor.shape)
    clean = decode_pixels(tensor.data, tensor.dtype, "x", shape)
    if len(level) not in (1, len(clean)):
        return tensor  # the servicer rejects it
    a, s = (np.resize(each, len(clean)).reshape(-1, 1, 1, 1) for each in (level.a, level.s))
    count = math.prod(shape[1:])
    noise = [standard_normal(seed, i, 0, count).reshape(shape[1:]) for i in range(len(clean))]
    return encode_tensor((a * clean + s * np.stack(noise)).astype(np.float32))


def png_of(tensor: pb.Tensor, *, scaled: bool = False) -> list[bytes]:
    """Return each image of a tensor [B, C, H, W] as a PNG file; empty if it has no such form.

    Args:
        tensor: f32, f16 or bf16; values beyond [-1, 1] are clipped.
        scaled: whether values are divided by the largest magnitude, for scores.
    """
    shape = tuple(tensor.shape)
    if len(shape) != 4 or shape[1] not in _MODES:
        return []
    values = _floats(tensor).reshape(shape)
    if scaled:
        values = values / (np.abs(values).max() or np.float32(1))
    return [_file(each) for each in _bytes(values)]


def sheet_of(tensor: pb.Tensor, *, scaled: bool = False) -> bytes | None:
    """Return the images of a tensor in one PNG file, as a grid; None if it has no such form."""
    files = png_of(tensor, scaled=scaled)
    if len(files) <= 1:
        return files[0] if files else None
    pictures = [Image.open(io.BytesIO(file)) for file in files]
    width, height = pictures[0].size
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    size = columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP
    sheet = Image.new(pictures[0].mode, size, "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, ((i % columns) * (width + _GAP), i // columns * (height + _GAP)))
    return _saved(sheet)


def decoded_bytes(fields: dict[str, Any], limits: Limits, *, noisy: bool) -> int:
    """Return about how many bytes the PNG files among fields take when they are decoded.

    Args:
        fields: of a request, as JSON values; pictures are as in ``tensor_of``.
        limits: of requests; what exceeds them is rejected before it is decoded.
        noisy: whether noise is added to them.
    """
    pixels = 0
    for value in fields.values():
        given = value.get("png") if isinstance(value, dict) else value
        files = given if isinstance(given, list) else [given]
        pixels += sum(map(_pixels_of, files[: limits.max_images + 1]))
    return (_NOISY if noisy else _DECODED) * min(pixels, limits.max_pixels)


def _pixels_of(file: Any) -> int:
    """Return the number of pixels by the head of a PNG file; 0 of what is none."""
    if isinstance(file, str):
        start = file.rpartition(",")[2][:_HEAD_TEXT]
        try:
            file = base64.b64decode(start, validate=True)
        except (binascii.Error, ValueError):
            return 0
    if not isinstance(file, bytes) or len(file) < _HEAD.size or not file.startswith(_MAGIC):
        return 0
    width, height = _HEAD.unpack_from(file)
    return int(width * height)


def _file_of(field: str, file: Any) -> bytes:
    """Return the bytes of one PNG file, whose head is complete."""
    if isinstance(file, str):
        try:
            file = base64.b64decode(file.rpartition(",")[2], validate=True)
        except (binascii.Error, ValueError):
            raise InvalidArgumentError(field, "a PNG file in base64", "another string") from None
    if not isinstance(file, bytes):
        raise InvalidArgumentError(field, "a PNG file in base64", kind_of(file))
    if len(file) < _HEAD.size or not file.startswith(_MAGIC):
        raise InvalidArgumentError(field, "a PNG file", "other data")
    return file


def _pixels(
    field: str, file: bytes, channels: int, given: tuple[int, int], size: tuple[int, int] | None
) -> Bytes:
    """Return one picture [C, H, W]; ``given`` is the width and height that were judged."""
    try:
        with Image.open(io.BytesIO(file), formats=("PNG",)) as picture:
            if picture.size != given:
                # A second head, which Pillow takes instead.
                expected = f"{given[0]}x{given[1]}, as its head says"
                got = f"{picture.width}x{picture.height}"
                raise InvalidArgumentError(field, expected, got)
            upright = _converted(field, picture, channels)
    except ElsError:
        raise
    except Exception:
        # A list of all exceptions of a decoder would not be complete; their texts speak of Python.
        raise InvalidArgumentError(field, "a PNG file", "a damaged one") from None
    if size is not None and upright.size != size[::-1]:
        upright = upright.resize(size[::-1], Image.Resampling.LANCZOS)
    pixels = np.asarray(upright).reshape(upright.height, upright.width, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _converted(field: str, picture: Image.Image, channels: int) -> Image.Image:
    """Return a picture in the mode of a model's channels; transparency is rejected."""
    if "A" in picture.mode or picture.has_transparency_data:
        alpha = np.asarray(picture.convert("RGBA").getchannel("A"))
        if int(alpha.min()) < _OPAQUE:
            raise InvalidArgumentError(field, "an opaque picture", "one with transparency")
        picture = picture.convert("RGB")
    if picture.mode.startswith("I"):
        raise InvalidArgumentError(field, "8 bits a channel", "16")
    return picture.convert(_MODES[channels])


def _floats(tensor: pb.Tensor) -> npt.NDArray[np.float32]:
    if tensor.dtype == pb.DTYPE_BF16:
        return (np.frombuffer(tensor.data, "<u2").astype(np.uint32) << 16).view(np.float32)
    layout = "<f2" if tensor.dtype == pb.DTYPE_F16 else "<f4"
    return np.frombuffer(tensor.data, layout).astype(np.float32)


def _bytes(values: npt.NDArray[np.float32]) -> Bytes:
    """Return pixels of [-1, 1], [B, C, H, W], as bytes; those that are not finite are black."""
    finite = np.nan_to_num(values, nan=-1.0, posinf=1.0, neginf=-1.0)
    pixels: Bytes = np.clip(np.rint((finite + 1) * 127.5), 0, 255).astype(np.uint8)
    return pixels


def _file(pixels: Bytes) -> bytes:
    """Return one image [C, H, W] as a PNG file."""
    rows = pixels.transpose(1, 2, 0)
    return _saved(Image.fromarray(rows[:, :, 0] if rows.shape[2] == 1 else rows))


def _saved(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()
