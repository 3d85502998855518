"""Trajectories of ``remix``: a mode, a size and a picture become a request of ``pyramid``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Required, TypeAlias, TypedDict, get_args

import numpy as np
import numpy.typing as npt

from els_client import _codec as codec
from els_client._models import Model
from els_client._remix_inputs import Picture, Size, mask_of, pixels_of, resized, resized_mask
from els_client._sample_codec import encode_sample
from els_client._types import Want
from els_proto.denoise.v1 import denoise_pb2 as pb

Mode: TypeAlias = Literal[
    "new", "wider", "taller", "tileable", "symmetric", "variation", "inpaint", "edit"
]

_STRETCHED = 1.5
"""Default ratio of the sides of a wider or taller picture to those of the model."""


@dataclass(frozen=True)
class _Needs:
    """Inputs of a mode: those that it needs, those that it may have, and its default strength."""

    needed: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()
    strength: float | None = None


_RETARGET = _Needs(("picture",), ("strength",), 0.2)
_MODES: dict[str, _Needs] = {
    "new": _Needs(),
    "wider": _RETARGET,
    "taller": _RETARGET,
    "tileable": _Needs(),
    "symmetric": _Needs(),
    "variation": _Needs(("picture",), ("strength",), 0.6),
    "inpaint": _Needs(("picture", "mask"), ("strength",)),
    "edit": _Needs(("start",), ("strength", "mask"), 0.3),
}


class RemixOptions(TypedDict, total=False):
    """Options of new pictures; see ``Client.remix``."""

    model: Required[str]
    mode: Mode
    size: tuple[int, int] | None
    count: int
    seed: int
    first_image: int
    steps: int | None
    strength: float | None
    mask: Picture | None
    start: Picture | None
    priority: int | None
    version: str | None


def encode_remix(
    described: Model,
    picture: Picture | None,
    *,
    previews: bool,
    model: str,
    mode: Mode = "new",
    size: tuple[int, int] | None = None,
    count: int = 1,
    seed: int = 0,
    first_image: int = 0,
    steps: int | None = None,
    strength: float | None = None,
    mask: Picture | None = None,
    start: Picture | None = None,
    priority: int | None = None,
    version: str | None = None,
) -> pb.SampleRequest:
    """Return the request for new pictures.

    Args:
        described: Description of the model.
        picture: The photograph; only some modes need it.
        previews: Whether each step has D(x).
        model: Name of the model in the request.
        mode: What is drawn; see ``Client.remix``, also for the others.
        size: Height and width.
        count: Number of pictures.
        seed: Of the noise.
        first_image: First image of the seed.
        steps: Of each scale.
        strength: Noise of the start.
        mask: Pixels that are drawn.
        start: Picture to start from.
        priority: Of the call.
        version: Of the model.

    Raises:
        InvalidArgumentError: An input is wrong, missing, or does not go with the mode or model.
    """
    if not described.scales:
        expected = "one of kind picture (els-server picture add PHOTO NAME)"
        codec.refuse("model", expected, f"{described.name} of kind {described.kind}")
    inputs = {"picture": picture, "mask": mask, "start": start, "strength": strength}
    check_mode(mode, {name for name, value in inputs.items() if value is not None})
    height_width = _size(described, mode, size)
    _check_limits(described, height_width, codec.whole("count", count), steps)
    begin, drawn = _begin(described.channels, height_width, mode, picture, start, mask)
    if strength is None:
        strength = _MODES[mode].strength
    elif not 0 < strength <= 1:
        codec.refuse("strength", "0 < strength <= 1", strength)
    want: tuple[Want, ...] = ("denoised",) if previews else ()
    return encode_sample(
        model=model,
        version=version,
        sampler="pyramid",
        size=height_width,
        count=count,
        seed=seed,
        first_image=first_image,
        steps=steps,
        want=want,
        start=begin,
        start_time=strength if begin is not None else None,
        mask=drawn,
        tileable=mode == "tileable",
        symmetric=mode == "symmetric",
        priority=priority,
    )


def check_mode(mode: str, given: set[str]) -> None:
    """Check that a mode has the inputs that it needs, and no others but the photograph.

    Args:
        mode: Name of the mode.
        given: Those of picture, mask, start and strength that there are.

    Raises:
        InvalidArgumentError: One is missing or does not go with the mode, or no mode has the name.
    """
    if mode not in _MODES:
        codec.refuse("mode", f"one of {', '.join(get_args(Mode))}", repr(mode))
    needs = _MODES[mode]
    for name in needs.needed:
        if name not in given:
            codec.refuse(name, f"one for mode {mode}", "none")
    for name in sorted(given - {"picture", *needs.needed, *needs.allowed}):
        takes = [one for one, its in _MODES.items() if name in (*its.needed, *its.allowed)]
        codec.refuse(name, f"none for mode {mode} (for {', '.join(takes)})", "one")


def _size(model: Model, mode: str, size: tuple[int, int] | None) -> Size:
    """Return height and width of the pictures."""
    if size is None:
        return (
            round(model.height * (_STRETCHED if mode == "taller" else 1)),
            round(model.width * (_STRETCHED if mode == "wider" else 1)),
        )
    if len(size) != 2:
        codec.refuse("size", "height and width", size)
    height, width = (codec.whole("size", side) for side in size)
    photograph = f"the photograph of {model.width}x{model.height}"
    ratio = width * model.height, height * model.width
    if mode in ("wider", "taller") and (ratio[0] <= ratio[1]) == (mode == "wider"):
        codec.refuse("size", f"{mode} proportions than {photograph}", f"{width}x{height}")
    return height, width


def _check_limits(model: Model, size: Size, count: int, steps: int | None) -> None:
    """Check size, number of pictures and steps against what the server publishes."""
    limits = model.limits
    if model.sizes:
        for side, (low, high), name in zip(
            size, (model.sizes.height, model.sizes.width), ("height", "width"), strict=True
        ):
            if not low <= side <= high:
                codec.refuse("size", f"a {name} of {low} to {high} pixels", side)
    if count > limits.max_images:
        codec.refuse("count", f"at most {limits.max_images}", count)
    pixels = count * model.channels * size[0] * size[1]
    if pixels > limits.max_pixels:
        expected = f"at most {limits.max_pixels} numbers (count·C·H·W)"
        codec.refuse("size", expected, pixels)
    if steps is not None:
        most = limits.max_steps // len(model.scales)
        if not 2 <= codec.whole("steps", steps) <= most:
            codec.refuse("steps", f"2 to {most} for each scale", steps)


def _begin(
    channels: int,
    size: Size,
    mode: str,
    picture: Picture | None,
    start: Picture | None,
    mask: Picture | None,
) -> tuple[npt.NDArray[Any] | None, npt.NDArray[np.float32] | None]:
    """Return the start [1, C, H, W] and the mask [1, 1, H, W] of a request; None for none."""
    needs = _MODES[mode].needed
    if "picture" not in needs and "start" not in needs:
        return None, None
    own = None if picture is None else pixels_of("picture", picture, channels)
    begin = own if start is None else pixels_of("start", start, channels)
    assert begin is not None  # The mode needs one of them.
    if own is not None and begin.shape != own.shape:
        _refuse_size("start", own.shape[1:], begin.shape[1:], "picture")
    drawn = None
    if mask is not None:
        which = mask_of(mask)
        if which.shape != begin.shape[1:]:
            of = "picture" if start is None else "start"
            _refuse_size("mask", begin.shape[1:], which.shape, of)
        drawn = resized_mask(which, size)[None, None].astype(np.float32)
    stretch = mode in ("wider", "taller")
    return resized(begin, size, stretch=stretch)[None], drawn


def _refuse_size(field: str, own: tuple[int, ...], other: tuple[int, ...], of: str) -> None:
    codec.refuse(field, f"{own[1]}x{own[0]} pixels, the size of {of}", f"{other[1]}x{other[0]}")
