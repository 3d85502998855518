"""Decoding of ``Sample`` requests to options of a sampler."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.config import Limits
from els_service.denoisers.base import DenoiserInfo, SizeRange
from els_service.denoisers.folder_scheduler import FolderScheduler
from els_service.denoisers.samplers import Options, check_options, options_for
from els_service.errors import InvalidArgumentError, ResourceExhaustedError
from els_service.server.requests import tensors
from els_service.server.requests.explanations import explanation_size, read_explained_steps
from els_service.server.requests.pyramid import check_pyramid, plan_of_request, scale_steps

SAMPLER_NAMES: dict[int, str] = {
    pb.SAMPLER_UNSPECIFIED: "ddim",
    pb.SAMPLER_DDIM: "ddim",
    pb.SAMPLER_DDIM_RELEASED: "ddim_released",
    pb.SAMPLER_DDPM: "ddpm",
    pb.SAMPLER_HEUN: "heun",
    pb.SAMPLER_EULER: "euler",
    pb.SAMPLER_DPMPP_2M: "dpmpp_2m",
    pb.SAMPLER_PYRAMID: "pyramid",
}
_CHURNED = (pb.SAMPLER_HEUN, pb.SAMPLER_EULER)
_ChurnOption = Literal["churn_min_sigma", "churn_max_sigma", "churn_noise"]
CHURN_OPTIONS: tuple[_ChurnOption, ...] = get_args(_ChurnOption)
_WINDOW_SCALES = (0.1, 10.0)
_STATE_BYTES = {pb.SAMPLER_DPMPP_2M: 16, pb.SAMPLER_PYRAMID: 16}
"""Of each number of the images, in a resume token, at most; 8 for other samplers."""


def count_of(request: pb.SampleRequest) -> int:
    """Return the number of images."""
    return request.count or 1


def image_shape_of(request: pb.SampleRequest, info: DenoiserInfo) -> tuple[int, int, int]:
    """Return [C, H, W] of the images to draw.

    Raises:
        InvalidArgumentError: The model does not answer images of this size.
    """
    channels, height, width = info.shape
    sizes = info.sizes or SizeRange((height, height), (width, width))
    size = request.height or height, request.width or width
    for name, side, (low, high) in zip(
        ("height", "width"), size, (sizes.height, sizes.width), strict=True
    ):
        if not low <= side <= high:
            raise InvalidArgumentError(name, f"0, or {low} to {high}", side)
    return channels, *size


def check_sample(request: pb.SampleRequest, info: DenoiserInfo, limits: Limits) -> None:
    """Check the fields of a request that do not depend on its sampler's numbers.

    Raises:
        InvalidArgumentError: A field is wrong.
        ResourceExhaustedError: A limit is exceeded.
    """
    count = count_of(request)
    tensors.bounded("labels", request.labels, limits)
    tensors.bounded("windows", request.windows, limits)
    if count < 1:
        raise InvalidArgumentError("count", "at least 1", count)
    if count > limits.max_images:
        raise ResourceExhaustedError("count", f"at most {limits.max_images}", count)
    if request.first_image < 0:
        raise InvalidArgumentError("first_image", "at least 0", request.first_image)
    image = image_shape_of(request, info)
    pixels = count * math.prod(image)
    tensors.check_pixels("count", pixels, limits)
    _check_steps(request, limits)
    check_pyramid(request, info, limits, (image[1], image[2]))
    _check_sampler(request)
    _check_window_scale(request, info)
    size = (2 + request.return_noise) * pixels * tensors.output_size(request.output_dtype)
    if request.return_resume_token:
        size += _STATE_BYTES.get(request.sampler, 8) * pixels
    if request.return_decoded:
        if info.decoded_shape is None:
            raise InvalidArgumentError("return_decoded", "false for this model", "true")
        decoded = count * math.prod(info.decoded_shape)
        tensors.check_pixels("count", decoded, limits)
        size += decoded * tensors.output_size(request.output_dtype)
    explained, detail = read_explained_steps(request, limits)
    if explained:
        size += count * explanation_size(image, detail, info)
    tensors.check_answer_size("count", size, limits)


def _check_steps(request: pb.SampleRequest, limits: Limits) -> None:
    times = len(request.times)
    if times > limits.max_steps:
        raise ResourceExhaustedError("times", f"at most {limits.max_steps}", f"{times} values")
    if times and request.steps not in (0, times):
        raise InvalidArgumentError("steps", f"0 or {times}, as there are times", request.steps)
    least = 0 if request.sampler == pb.SAMPLER_PYRAMID else 1
    if not times and request.steps < least:
        raise InvalidArgumentError("steps", f"at least {least}", request.steps)
    if request.steps > limits.max_steps:
        raise ResourceExhaustedError("steps", f"at most {limits.max_steps}", request.steps)


def _check_window_scale(request: pb.SampleRequest, info: DenoiserInfo) -> None:
    scale = request.window_scale
    if scale == 0:
        return
    low, high = _WINDOW_SCALES
    if not low <= scale <= high:
        raise InvalidArgumentError("window_scale", f"{low:g} to {high:g}, or 0", scale)
    if info.window is None or not info.max_window:
        raise InvalidArgumentError("window_scale", "0 for a model without windows", scale)
    if request.windows:
        raise InvalidArgumentError("window_scale", "0 with windows", scale)


def _check_sampler(request: pb.SampleRequest) -> None:
    if request.sampler not in SAMPLER_NAMES:
        raise InvalidArgumentError("sampler", "a known sampler", request.sampler)
    if request.eta and request.sampler != pb.SAMPLER_DDPM:
        raise InvalidArgumentError("eta", "0 or unset but for SAMPLER_DDPM", request.eta)
    if request.sampler not in _CHURNED:
        expected = "but for SAMPLER_HEUN and SAMPLER_EULER"
        if request.churn:
            raise InvalidArgumentError("churn", f"0 {expected}", request.churn)
        for name in CHURN_OPTIONS:
            if request.HasField(name):
                raise InvalidArgumentError(name, f"unset {expected}", getattr(request, name))


def options_of(request: pb.SampleRequest, info: DenoiserInfo, limits: Limits) -> Options:
    """Return the options of the sampler of a request that passed ``check_sample``.

    Raises:
        InvalidArgumentError: One is wrong, or does not go with the others or the model.
        ResourceExhaustedError: ``start`` has too many pixels.
    """

    def given(name: Literal["eta"] | _ChurnOption, default: float) -> float:
        value: float = getattr(request, name)
        return value if request.HasField(name) else default

    start = _start(request, info, limits)
    _, height, width = image_shape_of(request, info)
    plan = plan_of_request(request, info, limits, (height, width))
    options = options_for(
        info,
        steps=scale_steps(request, info) if plan else len(request.times) or request.steps,
        eta=given("eta", 1.0),
        churn=request.churn,
        churn_min_sigma=given("churn_min_sigma", 0.0),
        churn_max_sigma=given("churn_max_sigma", math.inf),
        churn_noise=given("churn_noise", 1.0),
        times=tuple(request.times),
        start=start,
        start_time=_start_time(request),
        scheduler=_scheduler(request, info),
        pyramid=plan,
    )
    check_options(SAMPLER_NAMES[request.sampler], options)
    return options


def held_bytes_of(sampler: str, options: Options, state_shape: tuple[int, ...]) -> int:
    """Return the bytes that a trajectory holds of its start, and of the D of an earlier step."""
    start = 0 if options.start is None else options.start.nbytes
    # ``pyramid``: the finished scale, and the mask.
    older = 8 * math.prod(state_shape) if sampler in ("dpmpp_2m", "pyramid") else 0
    return start + older


def _start(request: pb.SampleRequest, info: DenoiserInfo, limits: Limits) -> Tensor | None:
    """Return the images to start from, [1 or count, C, H, W] float64; None where there are none."""
    if not request.HasField("start"):
        return None
    message, count = request.start, count_of(request)
    shape = tensors.decode_shape(message, len(message.data), "start", limits)
    image = image_shape_of(request, info)
    if shape[0] not in (1, count) or shape[1:] != image:
        expected = f"[1 or {count}, {', '.join(map(str, image))}]"
        raise InvalidArgumentError("start.shape", expected, list(shape))
    pixels = tensors.decode_pixels(message.data, message.dtype, "start", shape)
    return torch.from_numpy(pixels.astype("float64"))


def _start_time(request: pb.SampleRequest) -> float:
    """Return the time at which the steps begin."""
    if request.HasField("start") == bool(request.start_time or request.times):
        if request.times and request.start_time:
            raise InvalidArgumentError("start_time", "unset with times", request.start_time)
        return request.start_time or 1.0
    if request.HasField("mask"):
        return 1.0
    if request.HasField("start"):
        raise InvalidArgumentError("start_time", "0 < start_time <= 1, or times, with start", 0)
    if request.start_time:
        raise InvalidArgumentError("start_time", "unset without start", request.start_time)
    return 1.0


def _scheduler(request: pb.SampleRequest, info: DenoiserInfo) -> FolderScheduler | None:
    if request.timesteps not in pb.Timesteps.values():
        raise InvalidArgumentError("timesteps", "known timesteps", request.timesteps)
    if request.timesteps != pb.TIMESTEPS_FOLDER:
        return None
    if info.scheduler is None:
        expected = "unset for a model without a diffusers scheduler"
        raise InvalidArgumentError("timesteps", expected, "TIMESTEPS_FOLDER")
    return info.scheduler
