"""Writes ``k_diffusion.json``: images that k-diffusion's own samplers draw.

    pip install k-diffusion
    python -m tests.golden.make_k_diffusion

k-diffusion brings a dozen packages that nothing else here needs, so tests compare with the file,
and with the package too where it is installed.
"""

from __future__ import annotations

import itertools
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from els_service.denoisers.noise import seeded_noise

GOLDEN = Path(__file__).with_name("k_diffusion.json")
COUNT, SHAPE, SEED = 2, (1, 2, 3), 5
NOISE = seeded_noise(SEED, COUNT, SHAPE)
CASES: dict[str, dict[str, Any]] = {
    "euler": {"sampler": "euler", "n": 7},
    "euler with churn": {
        "sampler": "euler",
        "n": 7,
        "s_churn": 5.0,
        "s_tmin": 0.05,
        "s_tmax": 20.0,
        "s_noise": 1.007,
    },
    "heun": {"sampler": "heun", "n": 7},
    "heun with churn": {
        "sampler": "heun",
        "n": 7,
        "s_churn": 2.0,
        "s_tmin": 0.05,
        "s_tmax": 20.0,
        "s_noise": 1.007,
    },
    "dpmpp_2m": {"sampler": "dpmpp_2m", "n": 7},
    "dpmpp_2m of two steps": {"sampler": "dpmpp_2m", "n": 2},
}


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    """Return a D that is no linear function of x, [B, C, H, W] float64."""
    return torch.tanh(x / (1 + sigma.view(-1, 1, 1, 1) ** 2).sqrt())


def drawn(case: dict[str, Any], sigma_min: float, sigma_max: float) -> Tensor:
    """Return what k-diffusion draws with the noise of this package."""
    from k_diffusion import sampling

    numbers = {name: value for name, value in case.items() if name.startswith("s_")}
    sigmas = sampling.get_sigmas_karras(case["n"], sigma_min, sigma_max).double()
    draws = itertools.count(1)
    original = torch.randn_like
    # They draw once a step, whether they churn or not.
    torch.randn_like = lambda *_, **__: NOISE(next(draws))
    try:
        x = NOISE(0) * (1 + sigmas[0] ** 2).sqrt()
        sample = getattr(sampling, f"sample_{case['sampler']}")
        result: Tensor = sample(denoise, x, sigmas, disable=True, **numbers)
    finally:
        torch.randn_like = original
    return result


def main() -> None:
    """Write the file."""
    torch.set_default_dtype(torch.float64)  # else their levels are float32
    content = {
        "k-diffusion": metadata.version("k-diffusion"),
        "torch": torch.__version__,
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "images": {
            name: drawn(case, 0.002, 80.0).flatten().tolist() for name, case in CASES.items()
        },
    }
    GOLDEN.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
