"""heun, euler and dpmpp_2m against k-diffusion's own."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from tests.golden.make_k_diffusion import CASES, COUNT, GOLDEN, NOISE, SHAPE, denoise, drawn
from tests.support.denoisers import run
from torch import Tensor

from els_service.denoisers.levels import Floats, NoiseLevel
from els_service.denoisers.samplers import SAMPLERS, DenoiseCall, Options


def at_80(_: Floats) -> NoiseLevel:
    return NoiseLevel(np.array([1.0]), np.array([80.0]))


def answer(ask: DenoiseCall) -> Tensor:
    return denoise(ask.x, torch.from_numpy(ask.level.sigma))


def ours(case: dict[str, Any]) -> Tensor:
    options = Options(
        steps=case["n"],
        schedule=at_80,
        churn=case.get("s_churn", 0.0),
        churn_min_sigma=case.get("s_tmin", 0.0),
        churn_max_sigma=case.get("s_tmax", math.inf),
        churn_noise=case.get("s_noise", 1.0),
    )
    return run(SAMPLERS[case["sampler"]](NOISE, options), answer)[1][-1].x


@pytest.mark.parametrize("name", CASES)
def test_samplers_draw_the_images_that_k_diffusion_drew(name: str) -> None:
    golden = json.loads(GOLDEN.read_text())
    want = torch.tensor(golden["images"][name], dtype=torch.float64).view(COUNT, *SHAPE)
    torch.testing.assert_close(ours(CASES[name]), want, rtol=0, atol=1e-10)


@pytest.mark.skipif(
    find_spec("k_diffusion") is None, reason="needs k-diffusion: pip install k-diffusion"
)
def test_samplers_draw_the_images_of_the_installed_k_diffusion() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        want = {name: drawn(case, 0.002, 80.0) for name, case in CASES.items()}
    finally:
        torch.set_default_dtype(before)
    for name, images in want.items():
        torch.testing.assert_close(ours(CASES[name]), images, rtol=0, atol=1e-10)
