"""Trajectories with the folder's timesteps draw the pictures of diffusers' own schedulers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)
from tests.support.denoisers import run
from tests.support.pretrained import LEVELS, SHAPE, STEPS, unet, write_folder
from torch import Tensor

from els_service.denoisers.base import Denoiser, make_query
from els_service.denoisers.noise import seeded_noise
from els_service.denoisers.samplers import (
    SAMPLERS,
    DenoiseCall,
    Step,
    check_options,
    options_for,
)
from els_service.engine.repository import ModelRepository

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

COUNT = 2
NOISE = seeded_noise(3, COUNT, SHAPE)
KINDS = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
}
SPACINGS = ("leading", "trailing", "linspace")


def served(root: Path, schedule: Any, **fields: Any) -> Denoiser:
    write_folder(root / "model", "kind: diffusers\n", unet=unet(**fields), scheduler=schedule)
    return ModelRepository(root).load("model")


def answer_of(denoiser: Denoiser) -> Any:
    def answer(ask: DenoiseCall) -> Tensor:
        query = make_query(ask.x.float(), ask.level)
        if ask.unclipped:
            query.unclipped = np.ones(len(query), np.bool_)
        return denoiser.denoise(query).mean.double()

    return answer


def ours(denoiser: Denoiser, sampler: str, n: int, **options: Any) -> list[Step]:
    chosen = options_for(denoiser.info, steps=n, scheduler=denoiser.info.scheduler, **options)
    check_options(sampler, chosen)
    return run(SAMPLERS[sampler](NOISE, chosen), answer_of(denoiser))[1]


def theirs(schedule: Any, n: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Return what a pipeline does with a scheduler: scale the noise, then step by step."""
    network = unet()
    schedule.set_timesteps(n)
    x = NOISE(0).float() * schedule.init_noise_sigma
    for i, timestep in enumerate(schedule.timesteps, 1):
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor",
            lambda *_, draw=i, **__: NOISE(draw).float(),
        )
        output = network(schedule.scale_model_input(x, timestep), timestep).sample
        x = schedule.step(output, timestep, x).prev_sample
    return x


def error(got: Tensor, want: Tensor) -> float:
    """Return the difference relative to the norm of the images."""
    norm = torch.linalg.vector_norm
    return float(norm(got.double() - want.double()) / norm(want.double()))


SAME: dict[str, tuple[str, int, dict[str, Any]]] = {
    "ddim": ("ddim", 10, {}),
    "ddim leading from 1": ("ddim", 10, {"steps_offset": 1, "set_alpha_to_one": False}),
    "ddim trailing": ("ddim", 10, {"timestep_spacing": "trailing"}),
    "ddim of v": ("ddim", 10, {"prediction_type": "v_prediction"}),
    "ddim of x0": ("ddim", 10, {"prediction_type": "sample"}),
    "ddim clipped": ("ddim", 10, {"clip_sample": True, "clip_sample_range": 0.5}),
    "ddim in all steps": ("ddim", STEPS, {}),
    "ddpm": ("ddpm", 10, {}),
    "ddpm leading from 1": ("ddpm", 10, {"steps_offset": 1}),
    "ddpm trailing": ("ddpm", 10, {"timestep_spacing": "trailing"}),
    "ddpm trailing uneven": ("ddpm", 70, {"timestep_spacing": "trailing"}),
    "ddpm linspace": ("ddpm", 10, {"timestep_spacing": "linspace"}),
    "ddpm clipped": ("ddpm", 10, {"clip_sample": True, "clip_sample_range": 0.5}),
    "ddpm small log": ("ddpm", 10, {"variance_type": "fixed_small_log"}),
    "ddpm large": ("ddpm", 10, {"variance_type": "fixed_large"}),
    "euler leading": ("euler", 10, {"timestep_spacing": "leading", "steps_offset": 1}),
    "euler trailing": ("euler", 10, {"timestep_spacing": "trailing"}),
    "euler leading Karras": (
        *("euler", 10),
        {"timestep_spacing": "leading", "steps_offset": 1, "use_karras_sigmas": True},
    ),
    "dpmpp_2m": ("dpmpp_2m", 10, {}),
    "dpmpp_2m of 20": ("dpmpp_2m", 20, {}),
    "dpmpp_2m leading": ("dpmpp_2m", 10, {"timestep_spacing": "leading", "steps_offset": 1}),
    "dpmpp_2m trailing": ("dpmpp_2m", 10, {"timestep_spacing": "trailing"}),
    "dpmpp_2m of v": ("dpmpp_2m", 10, {"prediction_type": "v_prediction"}),
}
"""Name → sampler, steps and fields for which our pictures are theirs up to float32."""


def scheduler(sampler: str, fields: dict[str, Any]) -> Any:
    clip = {"clip_sample": False} if sampler in ("ddim", "ddpm") else {}
    return KINDS[sampler](**LEVELS | clip | fields)


@pytest.mark.parametrize("name", SAME)
def test_the_folder_s_timesteps_draw_the_pictures_of_the_folder_s_scheduler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    sampler, n, fields = SAME[name]
    schedule = scheduler(sampler, fields)
    steps = ours(served(tmp_path, schedule), sampler, n)
    assert [step.index for step in steps] == list(range(1, n + 1))
    # float32 on either side, of a state in float64 here.
    assert error(steps[-1].x, theirs(schedule, n, monkeypatch)) < 5e-5
