"""Answers of a served diffusers folder beside those of diffusers itself."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from tests.support.denoisers import random_images
from tests.support.pretrained import LEVELS, STEPS, scheduler, write_folder
from torch import Tensor

from els_service.denoisers.base import Denoiser, make_query
from els_service.denoisers.levels import NoiseLevel, from_alpha_bar
from els_service.repository import ModelRepository

TIMESTEPS = torch.tensor([0, 7, 50, STEPS - 1])


@dataclass(frozen=True)
class Compared:
    """Our answer and theirs."""

    ours: Tensor
    theirs: Tensor


def served(root: Path, document: str = "kind: diffusers\n", **parts: Any) -> Denoiser:
    write_folder(root / "model", document, **parts)
    return ModelRepository(root).load("model")


def level_of(schedule: Any, timesteps: Tensor) -> NoiseLevel:
    return from_alpha_bar(schedule.alphas_cumprod[timesteps].double().numpy().clip(1e-12))


def clean_images(schedule: Any, outputs: Tensor, x: Tensor) -> Tensor:
    """Return the samples of DDIM's scheduler from outputs at ``TIMESTEPS``."""
    schedule.set_timesteps(STEPS)
    steps = [
        schedule.step(outputs[i : i + 1], int(timestep), x[i : i + 1]).pred_original_sample
        for i, timestep in enumerate(TIMESTEPS)
    ]
    return torch.cat(steps)


def by_ddim(root: Path, network: Any, schedule: Any, theirs: Any = None) -> Compared:
    """Compare D with that of DDIM's scheduler, whose levels are those of ``schedule``."""
    denoiser = served(root, unet=network, scheduler=schedule)
    x = random_images((4, *denoiser.info.shape))
    theirs = theirs or scheduler()
    outputs = network(x, TIMESTEPS).sample
    ours = denoiser.denoise(make_query(x, level_of(theirs, TIMESTEPS))).mean
    return Compared(ours, clean_images(theirs, outputs[:, : x.shape[1]], x))


def made(name: str, **fields: Any) -> Any:
    """Return a scheduler of theirs with the levels of the tests, without clipping."""
    kind = getattr(diffusers, name)
    known = inspect.signature(kind.__init__).parameters
    clipping = {"clip_sample": False} if "clip_sample" in known else {}
    return kind(**LEVELS | {"beta_schedule": "linear"} | clipping | fields)


def error_of(compared: Compared) -> float:
    """Return the relative error in the norm."""
    ours, theirs = compared.ours.double(), compared.theirs.double()
    return float((ours - theirs).norm() / theirs.norm())
