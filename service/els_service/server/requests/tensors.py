"""Decoding and encoding of the tensors and models of ``denoise.v1``: validating pure functions."""

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
from els_service.denoisers.base import Condition, Denoised, DenoiserInfo, SizeRange
from els_service.denoisers.folder_scheduler import FolderScheduler
from els_service.denoisers.levels import (
    MAX_SIGMA,
    MIN_SIGMA,
    NoiseLevel,
    Schedule,
    from_alpha_bar,
    from_sigma,
    from_time,
)
from els_service.engine.registry import ModelVersion
from els_service.engine.request_context import PRIORITIES
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

_ENCODED: dict[int, torch.dtype] = {
    pb.DTYPE_F32: torch.float32,
    pb.DTYPE_F16: torch.float16,
    pb.DTYPE_BF16: torch.bfloat16,
}

MAX_GUIDANCE = 100.0

_Number = TypeVar("_Number", int, float)

Request = pb.DenoiseRequest | pb.ScoreRequest
Conditioned = Request | pb.SampleRequest | pb.VjpRequest | pb.JvpRequest


def decode_shape(message: pb.Tensor, size: int, field: str, limits: Limits) -> tuple[int, ...]:
    """Return [B, C, H, W] of a tensor with ``size`` bytes of pixels.

    Raises:
        InvalidArgumentError: dtype, rank, a dimension or the byte count is wrong.
        ResourceExhaustedError: Too many images or pixels.
    """
    # A slice of a repeated field is a list, four times as fast as iteration.
    shape = tuple(message.shape[:MAX_REPORTED])
    if message.dtype not in _STORED:
        raise InvalidArgumentError(f"{field}.dtype", _names(_STORED), message.dtype)
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


def decode_conditions(
    request: Conditioned, info: DenoiserInfo, batch: int
) -> tuple[Condition, ...]:
    """Return the condition of each image; empty if the request has none.

    Raises:
        InvalidArgumentError: A field is wrong, or contradicts another field or the model.
    """
    guidance = request.guidance or 1.0
    if not request.HasField("conditioning"):
        if request.HasField("unconditional"):
            raise InvalidArgumentError("unconditional", "none without conditioning", "one")
        if request.guidance and info.condition_width:
            raise InvalidArgumentError("guidance", "0 without conditioning", guidance)
        return ()
    _check_guidance(guidance)
    if request.HasField("unconditional") != (guidance != 1):
        expected = "one if guidance is neither 0 nor 1, else none"
        got = "one" if request.HasField("unconditional") else "none"
        raise InvalidArgumentError("unconditional", expected, got)
    given = _conditions(request.conditioning, "conditioning", info, batch)
    if guidance == 1:
        return tuple(Condition(one) for one in given)
    without = _conditions(request.unconditional, "unconditional", info, batch)
    return tuple(Condition(one, other, guidance) for one, other in zip(given, without, strict=True))


def decode_guidance(request: Conditioned, batch: int) -> npt.NDArray[np.float64] | None:
    """Return the guidance by label of each image, [batch]; None where it is none.

    Whether the model and the labels permit it is checked with the query.

    Raises:
        InvalidArgumentError: It is out of range.
    """
    guidance = request.guidance or 1.0
    if guidance == 1 or request.HasField("conditioning"):
        return None
    _check_guidance(guidance)
    return np.full(batch, guidance)


def _check_guidance(guidance: float) -> None:
    if not abs(guidance) <= MAX_GUIDANCE:
        raise InvalidArgumentError("guidance", f"-{MAX_GUIDANCE:g} to {MAX_GUIDANCE:g}", guidance)


def _conditions(
    message: pb.Tensor, field: str, info: DenoiserInfo, batch: int
) -> npt.NDArray[np.float32]:
    """Return [batch, T, W] of a tensor with one condition, or one per image."""
    shape = tuple(message.shape[:MAX_REPORTED])
    # Before decoding: the model's rows bound the work.
    if not info.condition_width:
        raise InvalidArgumentError(field, "none for this model", list(shape))
    fits = len(shape) == 3 and shape[0] in (1, batch) and shape[2] == info.condition_width
    if not fits or not 1 <= shape[1] <= info.condition_rows:
        expected = f"[1 or {batch}, 1 to {info.condition_rows}, {info.condition_width}]"
        raise InvalidArgumentError(f"{field}.shape", expected, list(shape))
    if message.dtype not in _ENCODED:
        raise InvalidArgumentError(f"{field}.dtype", _names(_ENCODED), message.dtype)
    numbers = decode_pixels(message.data, message.dtype, field, shape)
    return np.broadcast_to(numbers, (batch, *shape[1:]))


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
    if dtype not in _ENCODED:
        raise InvalidArgumentError("output_dtype", _names(_ENCODED), dtype)
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
        array = torch.as_tensor(tensor).to(_ENCODED[dtype]).view(torch.int16).numpy()
    return np.ascontiguousarray(array)


def write_evidence(message: pb.Tensor, denoised: Denoised) -> None:
    """Fill an empty message with the log evidence [B, H, W] f32, if the model returned it."""
    if denoised.log_evidence is not None:
        write_tensor(message, denoised.log_evidence)


def encode_model(entry: ModelVersion, limits: Limits) -> pb.Model:
    """Return the description of a served version of a model."""
    info = entry.info
    channels, height, width = info.shape
    bank, window = info.bank, info.window
    return pb.Model(
        name=entry.model,
        version=str(entry.version),
        kind=info.kind,
        machine=info.machine,
        padding=info.padding,
        channels=channels,
        height=height,
        width=width,
        window=None
        if window is None
        else pb.WindowTable(sigma=window.sigma, k=window.k, max_k=info.max_window),
        schedule=info.schedule,
        label_count=info.label_count,
        label_names=info.label_names,
        limits=pb.Limits(
            max_images=limits.max_images,
            max_steps=limits.max_steps,
            max_message_bytes=limits.max_message_bytes,
            min_sigma=MIN_SIGMA,
            max_sigma=MAX_SIGMA,
            max_pixels=limits.max_pixels,
            priority_levels=PRIORITIES,
            max_in_flight_bytes=limits.max_in_flight_bytes,
        ),
        bank=None
        if bank is None
        else pb.Bank(
            fingerprint=bank.fingerprint,
            images=bank.images,
            source=bank.source,
            licence=bank.licence,
        ),
        batch_invariant=info.batch_invariant,
        has_log_evidence=info.has_log_evidence,
        has_gradients=info.has_gradients,
        has_sources=info.has_sources,
        implementation=info.implementation,
        memory_bytes=info.memory_bytes,
        conditioning=pb.Conditioning(max_rows=info.condition_rows, width=info.condition_width)
        if info.condition_width
        else None,
        decoded_shape=info.decoded_shape,
        step_seconds=0.0 if entry.loaded is None else entry.loaded.step_s,
        scheduler=None if info.scheduler is None else _encode_scheduler(info.scheduler),
        label_guidance=info.label_guidance,
        fold=info.fold,
        sizes=None if info.sizes is None else _encode_sizes(info.sizes),
    )


def _encode_sizes(sizes: SizeRange) -> pb.Sizes:
    return pb.Sizes(
        min_height=sizes.height[0],
        max_height=sizes.height[1],
        min_width=sizes.width[0],
        max_width=sizes.width[1],
    )


def _encode_scheduler(scheduler: FolderScheduler) -> pb.FolderScheduler:
    return pb.FolderScheduler(
        name=scheduler.name,
        timestep_spacing=scheduler.spacing,
        steps_offset=scheduler.steps_offset,
        set_alpha_to_one=scheduler.set_alpha_to_one,
        clip_sample_range=scheduler.clip or 0.0,
        variance_type=scheduler.variance_type,
        use_karras_sigmas=scheduler.karras,
        samplers=[pb.Sampler.Value(f"SAMPLER_{name.upper()}") for name in scheduler.samplers],
    )


def _names(dtypes: Iterable[int]) -> str:
    return "one of " + ", ".join(pb.DType.Name(pb.DType.ValueType(dtype)) for dtype in dtypes)
