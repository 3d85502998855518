"""Decoding and encoding of the tensors and noise levels of ``denoise.v1``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.config import Limits
from els_service.denoisers.base import Denoised
from els_service.denoisers.levels import (
    NoiseLevel,
    Schedule,
    from_alpha_bar,
    from_sigma,
    from_time,
)
from els_service.errors import InvalidArgumentError, ResourceExhaustedError

MAX_PIXEL = 1e9
"""Larger values would overflow float32 logits at the lowest noise."""
MAX_REPORTED = 100
"""Maximum elements of a list in an error text; a message may have millions."""
_OVERHEAD_BYTES = 4096
"""Maximum bytes of a response beside tensor data."""

_STORED: dict[int, np.dtype[Any]] = {
    pb.DTYPE_F32: np.dtype("<f4"),
    pb.DTYPE_F16: np.dtype("<f2"),
    pb.DTYPE_BF16: np.dtype("<u2"),
    pb.DTYPE_U8: np.dtype("u1"),
}
"""dtype → numpy layout of its bytes; bf16, which numpy lacks, as unsigned integers."""

ENCODED: dict[int, torch.dtype] = {
    pb.DTYPE_F32: torch.float32,
    pb.DTYPE_F16: torch.float16,
    pb.DTYPE_BF16: torch.bfloat16,
}
"""dtype → torch's; those of responses and of conditioning."""

_Number = TypeVar("_Number", int, float)

Request = pb.DenoiseRequest | pb.ScoreRequest


def decode_shape(message: pb.Tensor, size: int, field: str, limits: Limits) -> tuple[int, ...]:
    """Return [B, C, H, W] of a tensor with ``size`` bytes of pixels.

    Raises:
        InvalidArgumentError: dtype, rank, a dimension or the byte count is wrong.
        ResourceExhaustedError: Too many images or pixels.
    """
    # A slice of a repeated field is a list, four times as fast as iteration.
    shape = tuple(message.shape[:MAX_REPORTED])
    if message.dtype not in _STORED:
        raise InvalidArgumentError(f"{field}.dtype", one_of(_STORED), message.dtype)
    check_shape(shape, field, limits)
    check_bytes(size, message.dtype, field, shape)
    check_pixels(f"{field}.shape", math.prod(shape), limits)
    return shape


def check_bytes(size: int, dtype: int, field: str, shape: tuple[int, ...]) -> None:
    """Check the byte count of a tensor's data.

    Raises:
        InvalidArgumentError: It is not that of ``shape`` in ``dtype``.
    """
    expected = math.prod(shape) * _STORED[dtype].itemsize
    if size != expected:
        raise InvalidArgumentError(
            f"{field}.data", f"{expected} bytes for {list(shape)}", f"{size} bytes"
        )


def decode_pixels(
    data: bytes | memoryview, dtype: int, field: str, shape: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    """Return decoded pixels, float32 of ``shape``; u8 values v become v/127.5 - 1.

    Pixels of f32 are a view of ``data``, read-only if it is.

    Raises:
        InvalidArgumentError: The byte count is wrong, or a pixel is not finite or too large.
    """
    check_bytes(len(data), dtype, field, shape)
    return pixels_of(data, dtype, field, shape)


def pixels_of(
    data: bytes | memoryview, dtype: int, field: str, shape: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    """Return ``decode_pixels`` of data that passed ``check_bytes``.

    Raises:
        InvalidArgumentError: A pixel is not finite or too large.
    """
    flat = np.frombuffer(data, _STORED[dtype])
    if dtype == pb.DTYPE_U8:
        return (flat.astype(np.float32) / np.float32(127.5) - 1).reshape(shape)
    if dtype == pb.DTYPE_BF16:
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    elif dtype == pb.DTYPE_F16:
        flat = flat.astype(np.float32)
    check_finite(flat, field)
    return flat.reshape(shape)


def check_shape(shape: Sequence[int], field: str, limits: Limits) -> None:
    """Check rank, dimensions and number of images.

    Raises:
        InvalidArgumentError: Not four positive dimensions.
        ResourceExhaustedError: Too many images.
    """
    if len(shape) != 4:
        raise InvalidArgumentError(f"{field}.shape", "[B, C, H, W]", list(shape[:MAX_REPORTED]))
    if min(shape) < 1:
        raise InvalidArgumentError(f"{field}.shape", "positive dimensions", list(shape))
    if shape[0] > limits.max_images:
        expected = f"at most {limits.max_images} images"
        raise ResourceExhaustedError(f"{field}.shape", expected, shape[0])


def check_pixels(field: str, pixels: int, limits: Limits) -> None:
    """Check the number of pixels, B·C·H·W, that ``field`` implies.

    Raises:
        ResourceExhaustedError: Too many pixels.
    """
    if pixels > limits.max_pixels:
        expected = f"at most {limits.max_pixels} pixels (B·C·H·W)"
        raise ResourceExhaustedError(field, expected, pixels)


def bounded(field: str, values: Sequence[_Number], limits: Limits) -> Sequence[_Number]:
    """Return the values of a field with at most one per image, as a list.

    A message may have tens of millions of values; iteration over them would block the event loop.

    Raises:
        InvalidArgumentError: There are more than the maximum number of images.
    """
    # A slice of a repeated field is a list, four times as fast as iteration.
    some = values[: limits.max_images + 1]
    if len(some) > limits.max_images:
        expected = f"at most one for each of {limits.max_images} images"
        raise InvalidArgumentError(field, expected, f"{len(values)} values")
    return some


def check_finite(flat: npt.NDArray[np.float32], field: str) -> None:
    """Check the pixels [D] of a tensor.

    Raises:
        InvalidArgumentError: One is NaN, infinite or beyond ``MAX_PIXEL``.
    """
    # One pass accepts nearly every image; a comparison with NaN is false, so NaN is found below.
    # Not np.dot, which warns of an overflow.
    if not np.vdot(flat, flat) <= MAX_PIXEL**2:
        illegal = flat[~(np.abs(flat) <= MAX_PIXEL)]
        if illegal.size:
            expected = f"finite pixels, |x| <= {MAX_PIXEL:g}"
            raise InvalidArgumentError(field, expected, illegal[0])


def decode_level(message: pb.NoiseLevel, schedule: Schedule, limits: Limits) -> NoiseLevel:
    """Return the noise level of one or more images.

    Raises:
        InvalidArgumentError: Not exactly one kind is given, or a value is out of range.
    """
    values = message.sigma
    if len(values) == 1 and not (message.alpha_bar or message.time):
        return from_sigma(values[:])
    sigma = bounded("level", message.sigma, limits)
    alpha_bar = bounded("level", message.alpha_bar, limits)
    return one_level(sigma, alpha_bar, bounded("level", message.time, limits), schedule)


def one_level(
    sigma: Sequence[float], alpha_bar: Sequence[float], time: Sequence[float], schedule: Schedule
) -> NoiseLevel:
    """Return the noise level of the one list that is not empty.

    Raises:
        InvalidArgumentError: Not exactly one kind is given, or a value is out of range.
    """
    if sigma and not alpha_bar and not time:
        return from_sigma(sigma)
    if alpha_bar and not sigma and not time:
        return from_alpha_bar(alpha_bar)
    if time and not sigma and not alpha_bar:
        return from_time(time, schedule)
    named = {"sigma": sigma, "alpha_bar": alpha_bar, "time": time}
    got = " and ".join(name for name, values in named.items() if values) or "none"
    raise InvalidArgumentError("level", "exactly one of sigma, alpha_bar, time", got)


def decode_windows(windows: Sequence[int]) -> Sequence[int]:
    """Return the windows of a request.

    Raises:
        InvalidArgumentError: One is 0, which internally means the model's default.
    """
    if 0 in windows:
        raise InvalidArgumentError("windows", "odd and positive", 0)
    return windows


def output_size(dtype: int) -> int:
    """Return the bytes of one element of a response.

    Raises:
        InvalidArgumentError: Not a dtype of responses.
    """
    dtype = dtype or pb.DTYPE_F32
    if dtype not in ENCODED:
        raise InvalidArgumentError("output_dtype", one_of(ENCODED), dtype)
    return _STORED[dtype].itemsize


def answer_size(shape: Sequence[int], dtype: int, evidence: bool) -> int:
    """Return the bytes of the tensors in the response to images [B, C, H, W].

    Raises:
        InvalidArgumentError: Not a dtype of responses.
    """
    pixels = math.prod(shape)
    return pixels * output_size(dtype) + (pixels // shape[1] * 4 if evidence else 0)


def check_answer_size(field: str, size: int, limits: Limits) -> None:
    """Check that a response with ``size`` bytes of tensors, implied by ``field``, fits a message.

    Raises:
        ResourceExhaustedError: It exceeds the maximum message size.
    """
    if size > limits.max_message_bytes - _OVERHEAD_BYTES:
        expected = f"a response of at most {limits.max_message_bytes} bytes"
        raise ResourceExhaustedError(field, expected, f"{size} bytes")


def encode_tensor(
    tensor: Tensor | npt.NDArray[np.float32], dtype: pb.DType.ValueType = pb.DTYPE_F32
) -> pb.Tensor:
    """Return a tensor message of float32 numbers; ``dtype`` passed ``output_size``."""
    message = pb.Tensor()
    write_tensor(message, tensor, dtype)
    return message


def write_tensor(
    message: pb.Tensor,
    tensor: Tensor | npt.NDArray[np.float32],
    dtype: pb.DType.ValueType = pb.DTYPE_F32,
) -> None:
    """Fill an empty tensor message in place, which saves a copy of the tensor."""
    message.dtype = dtype or pb.DTYPE_F32
    message.shape[:] = tensor.shape
    message.data = bytes_of(tensor, dtype)


def bytes_of(tensor: Tensor | npt.NDArray[np.float32], dtype: pb.DType.ValueType) -> bytes:
    """Return float32 numbers encoded as ``dtype``, which passed ``output_size``."""
    return buffer_of(tensor, dtype).tobytes()


def buffer_of(
    tensor: Tensor | npt.NDArray[np.float32], dtype: pb.DType.ValueType
) -> npt.NDArray[Any]:
    """Return ``bytes_of`` as an array in C order, a view of ``tensor`` if possible."""
    if dtype in (pb.DTYPE_UNSPECIFIED, pb.DTYPE_F32):
        array: npt.NDArray[Any] = tensor.numpy() if isinstance(tensor, Tensor) else tensor
    else:
        # As integers: numpy has no bf16.
        array = torch.as_tensor(tensor).to(ENCODED[dtype]).view(torch.int16).numpy()
    return np.ascontiguousarray(array)


def write_evidence(message: pb.Tensor, denoised: Denoised) -> None:
    """Fill an empty message with the log evidence [B, H, W] f32, if the model returned it."""
    if denoised.log_evidence is not None:
        write_tensor(message, denoised.log_evidence)


def one_of(dtypes: Iterable[int]) -> str:
    """Return "one of" and the names of dtypes, for errors."""
    return "one of " + ", ".join(pb.DType.Name(pb.DType.ValueType(dtype)) for dtype in dtypes)
