"""Draws images with a sampler of k-diffusion, whose denoiser is a served model.

Usage: pip install 'els-denoise[k-diffusion]'
       python clients/examples/k_diffusion_sampling.py --model fashion-els --out drawn.npy
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from k_diffusion import sampling

from els_client import Client
from els_client.torch import KDenoiser


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="127.0.0.1:50051", help="address of the server")
    parser.add_argument("--model", default="fashion-els", help="name of the model")
    parser.add_argument("--label", type=int, default=-1, help="label; -1 for none")
    parser.add_argument("--steps", type=int, default=20, help="steps of Heun's method")
    parser.add_argument("--out", type=Path, default=Path("drawn.npy"), help="array to write")
    arguments = parser.parse_args()
    with Client(arguments.target) as client:
        drawn = draw(client, arguments.model, arguments.steps, arguments.label)
    np.save(arguments.out, drawn.numpy())


def draw(
    client: Client, model: str, steps: int, label: int = -1, count: int = 4, seed: int = 0
) -> torch.Tensor:
    """Return images [count, C, H, W] in [-1, 1] by Heun's method (EDM, algorithm 1)."""
    denoiser = KDenoiser(client, model, label)
    sigmas = denoiser.get_sigmas(steps)
    shape = (count, *client.model(model).shape)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    drawn = sampling.sample_heun(denoiser, noise * sigmas[0], sigmas, disable=True)
    return torch.as_tensor(drawn)


if __name__ == "__main__":
    main()
