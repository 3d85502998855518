"""Requests of ``Vjp`` and ``Jvp``: from messages to queries."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.config import Limits
from els_service.denoisers.base import DenoiserInfo, Query, make_query
from els_service.errors import InvalidArgumentError
from els_service.server.requests import forms, tensors
from els_service.server.requests.conditioning import decode_conditions, decode_guidance

_EVIDENCE_BYTES = 16
"""More than evidence has for each number of an image and its log evidence."""

ProductRequest = pb.VjpRequest | pb.JvpRequest


def read_product(
    request: ProductRequest,
    direction: pb.Tensor,
    field: str,
    info: DenoiserInfo,
    limits: Limits,
) -> tuple[Query, npt.NDArray[np.float32]]:
    """Return the query of x and its direction, of the shape of x.

    Args:
        request: of ``Vjp`` or ``Jvp``.
        direction: its cotangent or tangent.
        field: name of the direction.
        info: description of the model.
        limits: of requests.

    Raises:
        InvalidArgumentError, ResourceExhaustedError: A field is wrong, or exceeds a limit.
    """
    x = request.x
    shape = tensors.decode_shape(x, len(x.data), "x", limits)
    if tuple(direction.shape[: tensors.MAX_REPORTED]) != shape:
        got = list(direction.shape[: tensors.MAX_REPORTED])
        raise InvalidArgumentError(f"{field}.shape", f"{list(shape)}, as x", got)
    tensors.decode_shape(direction, len(direction.data), field, limits)
    if direction.dtype == pb.DTYPE_U8:
        raise InvalidArgumentError(f"{field}.dtype", "a floating-point type", "DTYPE_U8")
    size = 2 * math.prod(shape) * tensors.output_size(request.output_dtype)
    if request.return_evidence and info.reuses_evidence:
        size += _EVIDENCE_BYTES * (1 + shape[1]) * math.prod(shape) // shape[1]
    tensors.check_answer_size("x.shape", size, limits)
    query = make_query(
        forms.black(shape),
        tensors.decode_level(request.level, info.levels, limits),
        tensors.bounded("labels", request.labels, limits),
        tensors.decode_windows(tensors.bounded("windows", request.windows, limits)),
        decode_conditions(request, info, shape[0]),
    )
    query.guidance = decode_guidance(request, shape[0])
    query.pixels = tensors.pixels_of(x.data, x.dtype, "x", shape)
    return query, tensors.pixels_of(direction.data, direction.dtype, field, shape)
