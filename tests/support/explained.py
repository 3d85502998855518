"""Queries that are explained and differentiated, and their specification by brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.kernels.cases import Case
from tests.kernels.moment_budgets import Budgets, budgets
from tests.support.models_folder import (
    LABELLED,
    SHAPE,
    tiny_bank,
)

from els_client import Client
from els_kernels import GEOMETRIES, PatchAttention, PatchMoments
from els_kernels.reference_statistics import ReferencePosterior
from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.denoisers.analytic import AnalyticDenoiser
from els_service.repository import ModelRepository

SIGMA = [0.3, 1.0, 4.0]
RANGES = [(0, 12), (0, 4), (8, 12)]
CHOSEN = [-1, 0, 2]
"""Labels of the three images, and their ranges in the bank, which is sorted by label."""


def images(seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(size=(3, *SHAPE)).astype(np.float32)


def references(
    models: Path, name: str, x: np.ndarray[Any, Any]
) -> list[tuple[ReferencePosterior, Budgets]]:
    """Return the specification of each image, and how far an explanation may lie from it."""
    denoiser = ModelRepository(models).load(name)
    assert isinstance(denoiser, AnalyticDenoiser)
    info, pixels = denoiser.info, tiny_bank().pixels()
    windows = [1] * 3 if info.window is None else info.window.at(np.array(SIGMA)).tolist()
    geometry = GEOMETRIES[info.machine, info.padding]
    found = []
    for image, limits, sigma, k in zip(torch.from_numpy(x), RANGES, SIGMA, windows, strict=True):
        bank = pixels[slice(*limits)]
        reference = ReferencePosterior(image, bank, 1.0, sigma, k, geometry)
        window = None if geometry.whole else torch.tensor([k])
        level = torch.ones(1, dtype=torch.float64), torch.tensor([sigma], dtype=torch.float64)
        case = Case(geometry, bank, image[None], *level, window, torch.tensor([[0, len(bank)]]))
        moments = PatchMoments(PatchAttention(bank), bank)
        found.append((reference, budgets(moments, case, 0, reference)))
    return found


def within(got: np.ndarray[Any, Any], want: torch.Tensor, slack: torch.Tensor | float) -> None:
    # Answers are float32.
    assert ((torch.tensor(got) - want).abs() <= slack + 1e-7 * want.abs()).all()


def message_of(x: np.ndarray[Any, Any]) -> pb.Tensor:
    return pb.Tensor(dtype=pb.DTYPE_F32, shape=x.shape, data=x.tobytes())


def assert_serves(client: Client) -> None:
    assert client.denoise(images(1), model=LABELLED[0], sigma=1.0).shape == (3, *SHAPE)
