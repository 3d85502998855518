"""Fields of a ``Sample`` request for ``SAMPLER_PYRAMID``, and the plan that they describe."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.config import Limits
from els_service.denoisers.base import DenoiserInfo, Query, make_query
from els_service.denoisers.levels import MAX_SIGMA, from_sigma
from els_service.denoisers.pyramids import PyramidPlan, Size, asked_sizes
from els_service.denoisers.samplers import Options
from els_service.denoisers.samplers.pyramid import skipped_steps
from els_service.errors import InvalidArgumentError, ResourceExhaustedError
from els_service.server.requests import tensors


def check_pyramid(
    request: pb.SampleRequest, info: DenoiserInfo, limits: Limits, size: Size
) -> None:
    """Check the fields of a request that ``SAMPLER_PYRAMID`` reads, or rejects.

    Args:
        request: the request.
        info: description of its model.
        limits: of requests.
        size: height and width of its images.

    Raises:
        InvalidArgumentError: A field is wrong, or not for this sampler or model.
        ResourceExhaustedError: There are too many steps.
    """
    if request.sampler != pb.SAMPLER_PYRAMID:
        given = {
            "tileable": request.tileable,
            "symmetric": request.symmetric,
            "mask": request.HasField("mask"),
        }
        for name in (name for name, is_set in given.items() if is_set):
            raise InvalidArgumentError(name, "unset but for SAMPLER_PYRAMID", "set")
        return
    if not info.scales:
        expected = "another for a model without scales (those of kind picture have some)"
        raise InvalidArgumentError("sampler", expected, "SAMPLER_PYRAMID")
    for name in ("labels", "windows", "times"):
        if values := list(getattr(request, name)):
            raise InvalidArgumentError(name, "none for SAMPLER_PYRAMID", values[:8])
    if request.return_noise:
        expected = "false for SAMPLER_PYRAMID, each of whose scales has noise of its own"
        raise InvalidArgumentError("return_noise", expected, "true")
    if request.tileable and request.symmetric:
        raise InvalidArgumentError("symmetric", "false with tileable", "true")
    total = scale_steps(request, info) * len(info.scales)
    if total > limits.max_steps:
        expected = f"at most {limits.max_steps // len(info.scales)} for each scale"
        raise ResourceExhaustedError("steps", expected, scale_steps(request, info))
    _check_border(request, info, size)


def border_of(request: pb.SampleRequest, info: DenoiserInfo) -> int:
    """Return the pixels that a tileable picture repeats on each side of a query; otherwise 0."""
    return info.patch - 1 if request.tileable else 0


def _check_border(request: pb.SampleRequest, info: DenoiserInfo, size: Size) -> None:
    """Check that the border of a tileable picture fits the model's sizes."""
    if not request.tileable or info.sizes is None:
        return
    border = 2 * border_of(request, info)
    highest = info.sizes.height[1] - border, info.sizes.width[1] - border
    for name, side, most in zip(("height", "width"), size, highest, strict=True):
        if side > most:
            raise InvalidArgumentError(name, f"at most {most} with tileable", side)


def scale_steps(request: pb.SampleRequest, info: DenoiserInfo) -> int:
    """Return the steps of each scale: those of the request, or the model's own."""
    return request.steps or info.scale_steps


def plan_of_request(
    request: pb.SampleRequest, info: DenoiserInfo, limits: Limits, size: Size
) -> PyramidPlan | None:
    """Return the plan of a request; None for other samplers.

    Raises:
        InvalidArgumentError: The mask is wrong.
        ResourceExhaustedError: The mask has too many pixels.
    """
    if request.sampler != pb.SAMPLER_PYRAMID:
        return None
    return PyramidPlan(
        asked_sizes(info.scales, size, info.patch),
        info.patch,
        tileable=request.tileable,
        symmetric=request.symmetric,
        mask=_mask(request, limits, size),
    )


def expected_queries(options: Options, channels: int, count: int) -> tuple[tuple[Query, int], ...]:
    """Return queries like those of each scale, without memory, and how many there are of each.

    Args:
        options: of a request; without a plan there are none.
        channels: of its images.
        count: number of its images.
    """
    if options.pyramid is None:
        return ()
    found = []
    for scale, size in enumerate(options.pyramid.sizes):
        skipped = skipped_steps(options) if scale == 0 else 0
        border = 2 * options.pyramid.border
        shape = count, channels, size[0] + border, size[1] + border
        pixels = np.broadcast_to(np.float32(0), shape)
        for level, times in ((MAX_SIGMA, int(not skipped)), (1.0, options.steps - max(1, skipped))):
            if times:
                found.append((make_query(pixels, from_sigma([level]), scale), times))
    return tuple(found)


def _mask(request: pb.SampleRequest, limits: Limits, size: Size) -> Tensor | None:
    if not request.HasField("mask"):
        return None
    if not request.HasField("start"):
        raise InvalidArgumentError("mask", "unset without start", "set")
    message, count = request.mask, request.count or 1
    shape = tensors.decode_shape(message, len(message.data), "mask", limits)
    if shape[0] not in (1, count) or shape[1:] != (1, *size):
        expected = f"[1 or {count}, 1, {size[0]}, {size[1]}]"
        raise InvalidArgumentError("mask.shape", expected, list(shape))
    if message.dtype == pb.DTYPE_U8:
        raise InvalidArgumentError("mask.dtype", "floats, 0 or 1", "DTYPE_U8")
    values = tensors.decode_pixels(message.data, message.dtype, "mask", shape)
    if not np.isin(values, (0.0, 1.0)).all():
        raise InvalidArgumentError("mask", "values 0 (kept) and 1 (drawn)", "others")
    return torch.from_numpy(values.astype("float64"))
