"""Conversion of trajectories between numpy and messages."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, get_args

from els_client import _codec as codec
from els_client._step import Step
from els_client._types import (
    Conditions,
    Integers,
    Levels,
    Pixels,
    Sampler,
    Timesteps,
    Want,
)
from els_proto.denoise.v1 import denoise_pb2 as pb

SAMPLERS: dict[str, pb.Sampler.ValueType] = {
    "ddim": pb.SAMPLER_DDIM,
    "ddim_released": pb.SAMPLER_DDIM_RELEASED,
    "ddpm": pb.SAMPLER_DDPM,
    "heun": pb.SAMPLER_HEUN,
    "euler": pb.SAMPLER_EULER,
    "dpmpp_2m": pb.SAMPLER_DPMPP_2M,
    "pyramid": pb.SAMPLER_PYRAMID,
}
_TIMESTEPS: dict[str | None, pb.Timesteps.ValueType] = {
    None: pb.TIMESTEPS_UNSPECIFIED,
    "aligned": pb.TIMESTEPS_ALIGNED,
    "folder": pb.TIMESTEPS_FOLDER,
}
_STEPS = 20


@codec.invalid_arguments()
def encode_sample(
    *,
    model: str,
    count: int = 1,
    seed: int = 0,
    steps: int | None = None,
    sampler: Sampler = "ddim",
    label: Integers | None = None,
    eta: float | None = None,
    churn: float = 0.0,
    want: Collection[Want] = ("x", "denoised"),
    window: Integers | None = None,
    conditioning: Conditions | None = None,
    unconditional: Conditions | None = None,
    guidance: float | None = None,
    priority: int | None = None,
    version: str | None = None,
    survive_breaks: bool = False,
    explain_steps: Integers = (),
    explain_top: int = 8,
    explain_images: int = 0,
    originality: bool | str = False,
    window_scale: float | None = None,
    timesteps: Timesteps | None = None,
    start: Pixels | None = None,
    start_time: float | None = None,
    times: Levels | None = None,
    first_image: int = 0,
    churn_min_sigma: float | None = None,
    churn_max_sigma: float | None = None,
    churn_noise: float | None = None,
    size: tuple[int, int] | None = None,
    tileable: bool = False,
    symmetric: bool = False,
    mask: Pixels | None = None,
) -> pb.SampleRequest:
    """Return the request for ``count`` samples; None means the server's default."""
    if sampler not in SAMPLERS:
        codec.refuse("sampler", f"one of {', '.join(SAMPLERS)}", repr(sampler))
    if not set(want) <= set(get_args(Want)):
        codec.refuse("want", f"any of {', '.join(get_args(Want))}", repr(want))
    seed, count = codec.whole("seed", seed), codec.whole("count", count)
    if not 0 <= seed < 2**64:
        codec.refuse("seed", "0 to 2**64 - 1", seed)
    if count < 1:  # In the message 0 means 1.
        codec.refuse("count", "at least 1", count)
    if timesteps not in _TIMESTEPS:
        codec.refuse("timesteps", "'aligned' or 'folder'", repr(timesteps))
    if start_time is not None and start_time == 0:  # In the message 0 means none.
        codec.refuse("start_time", "0 < start_time <= 1", start_time)
    height, width = _sides(size)
    listed = codec.listed("times", times, codec.REALS)
    if times is not None and not listed:
        codec.refuse("times", "at least one", "none")
    if steps is None:
        steps = 0 if listed or sampler == "pyramid" else _STEPS
    steps, first_image = codec.whole("steps", steps), codec.whole("first_image", first_image)
    return pb.SampleRequest(
        model=model,
        count=count,
        seed=seed,
        steps=steps,
        sampler=SAMPLERS[sampler],
        labels=codec.listed("label", label, codec.INTEGERS),
        windows=codec.listed("window", window, codec.INTEGERS),
        conditioning=codec.conditions("conditioning", conditioning),
        unconditional=codec.conditions("unconditional", unconditional),
        guidance=codec.guidance_of(guidance),
        eta=eta,
        churn=churn,
        return_x="x" in want,
        return_denoised="denoised" in want,
        return_noise="noise" in want,
        return_decoded="decoded" in want,
        priority=codec.priority_of(priority),
        version=version or "",
        return_resume_token=survive_breaks,
        **_explained(explain_steps, explain_top, explain_images),
        return_originality=bool(originality),
        window_scale=window_scale or 0.0,
        originality_model=originality if isinstance(originality, str) else "",
        timesteps=_TIMESTEPS[timesteps],
        start=None if start is None else codec.encode_tensor(start, "start"),
        start_time=start_time or 0.0,
        times=listed,
        first_image=first_image,
        churn_min_sigma=churn_min_sigma,
        churn_max_sigma=churn_max_sigma,
        churn_noise=churn_noise,
        height=height,
        width=width,
        tileable=tileable,
        symmetric=symmetric,
        mask=None if mask is None else codec.encode_tensor(mask, "mask"),
    )


def _explained(steps: Integers, top: int, images: int) -> dict[str, Any]:
    """Return the fields of a sample that explains some steps; none without steps."""
    # In the message 0 means 8.
    codec.check_count("explain_top", top, least=1)
    codec.check_count("explain_images", images, least=0)
    listed = codec.listed("explain_steps", steps, codec.INTEGERS)
    for step in listed:
        codec.check_count("explain_steps", step, least=1)
    if not listed:
        return {}
    return {"explain_steps": listed, "explain_top": top, "explain_images": images}


def decode_step(step: pb.SampleResponse) -> Step:
    """Return the step of a message."""
    return Step(
        index=step.index,
        total=step.total,
        alpha_bar=step.alpha_bar,
        _x=codec.decode_tensor(step.x) if step.HasField("x") else None,
        _denoised=codec.decode_tensor(step.denoised) if step.HasField("denoised") else None,
        _noise=codec.decode_tensor(step.noise) if step.HasField("noise") else None,
        _decoded=codec.decode_tensor(step.decoded) if step.HasField("decoded") else None,
        scale=step.scale,
        scales=max(1, step.scales),
    )


def _sides(size: tuple[int, int] | None) -> tuple[int, int]:
    """Return height and width; 0, the model's own, for None."""
    if size is None:
        return 0, 0
    sides = [codec.whole("size", side) for side in size]
    if len(sides) != 2 or not all(1 <= side < 2**31 for side in sides):
        codec.refuse("size", "positive height and width", f"{size!r:.80}")
    return sides[0], sides[1]
