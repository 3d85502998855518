"""Requests of ``Vjp``, ``Jvp`` and ``Explain`` to queries, and the answers to them."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from els_kernels import MAX_SOURCES
from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.config import Limits
from els_service.denoisers.base import DenoiserInfo, Query, make_query
from els_service.denoisers.explanations import Explanation
from els_service.errors import InvalidArgumentError
from els_service.server.requests import forms, tensors
from els_service.server.requests.conditioning import decode_conditions, decode_guidance

DEFAULT_SOURCES = 8
MAX_SHARES = 1 << 16
"""Maximum bank images in a response, by share."""

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


def read_explain(
    request: pb.ExplainRequest, info: DenoiserInfo, limits: Limits
) -> tuple[Query, int]:
    """Return the query and the number of sources of each pixel.

    Raises:
        InvalidArgumentError, ResourceExhaustedError: A field is wrong, or exceeds a limit.
    """
    if not 0 <= request.top <= MAX_SOURCES:
        raise InvalidArgumentError("top", f"1 to {MAX_SOURCES}, or 0", request.top)
    top = request.top or DEFAULT_SOURCES
    x = request.x
    shape = tensors.decode_shape(x, len(x.data), "x", limits)
    tensors.check_answer_size("top", explanation_size(shape, top, info), limits)
    query = make_query(
        forms.black(shape),
        tensors.decode_level(request.level, info.levels, limits),
        tensors.bounded("labels", request.labels, limits),
        tensors.decode_windows(tensors.bounded("windows", request.windows, limits)),
    )
    query.pixels = tensors.pixels_of(x.data, x.dtype, "x", shape)
    return query, top


def explanation_size(shape: tuple[int, ...], top: int, info: DenoiserInfo) -> int:
    """Return the bytes of the tensors that explain one image."""
    _, channels, height, width = shape
    images = 0 if info.bank is None else min(info.bank.images, MAX_SHARES)
    names = sum(len(name.encode()) + 2 for name in info.label_names)
    # Denoised image and variance, entropy, weights and sources; image, share and label.
    return 4 * height * width * (2 * channels + 1 + 4 * top) + 12 * images + names


def write_explanation(
    index: int,
    found: Explanation,
    top: int,
    info: DenoiserInfo,
) -> pb.ExplainResponse:
    """Return the message of one image.

    Args:
        index: of the image in the request.
        found: its explanation, with at least ``top`` sources.
        top: number of sources of each pixel.
        info: description of the model.
    """
    assert info.bank is not None
    shares = found.shares[0]
    order = np.argsort(-shares, kind="stable")[:MAX_SHARES]
    order = order[shares[order] > 0]
    kept = shares[order].astype(np.float32)
    return pb.ExplainResponse(
        index=index,
        denoised=tensors.encode_tensor(found.pixels),
        variance=tensors.encode_tensor(found.variance),
        entropy=tensors.encode_tensor(found.entropy),
        weights=tensors.encode_tensor(found.weights[..., :top]),
        sources=_int32(found.sources[0, :, :, :top]),
        share_images=_int32(order),
        shares=tensors.encode_tensor(kept),
        share_labels=b"" if found.labels is None else _int32(found.labels[order]),
        dropped_share=max(0.0, 1.0 - float(shares[order].sum())),
        bank_fingerprint=info.bank.fingerprint,
        bank_images=len(shares),
        label_names=info.label_names if index == 0 else (),
    )


def _int32(values: npt.NDArray[np.int64]) -> bytes:
    return values.astype("<i4").tobytes()
