"""Decoding of conditioning and guidance, by class label or by embedding."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.denoisers.base import Condition, DenoiserInfo
from els_service.errors import InvalidArgumentError
from els_service.server.requests import tensors

MAX_GUIDANCE = 100.0

Conditioned = tensors.Request | pb.SampleRequest | pb.VjpRequest | pb.JvpRequest


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
    shape = tuple(message.shape[: tensors.MAX_REPORTED])
    # Before decoding: the model's rows bound the work.
    if not info.condition_width:
        raise InvalidArgumentError(field, "none for this model", list(shape))
    fits = len(shape) == 3 and shape[0] in (1, batch) and shape[2] == info.condition_width
    if not fits or not 1 <= shape[1] <= info.condition_rows:
        expected = f"[1 or {batch}, 1 to {info.condition_rows}, {info.condition_width}]"
        raise InvalidArgumentError(f"{field}.shape", expected, list(shape))
    if message.dtype not in tensors.ENCODED:
        expected = tensors.one_of(tensors.ENCODED)
        raise InvalidArgumentError(f"{field}.dtype", expected, message.dtype)
    numbers = tensors.decode_pixels(message.data, message.dtype, field, shape)
    return np.broadcast_to(numbers, (batch, *shape[1:]))
