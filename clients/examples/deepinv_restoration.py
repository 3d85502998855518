"""Restores a picture with algorithms of deepinv, whose denoiser is a served model.

Usage: pip install 'els-denoise[deepinv]'
       python clients/examples/deepinv_restoration.py shoe.png --model fashion-els --label 7

The picture is blurred and given noise, and restored by plug-and-play; half of its pixels are
hidden, and drawn by diffusion posterior sampling. The size of the picture is that of the model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepinv
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from els_client import Client
from els_client.torch import DeepinvDenoiser

NOISE = 0.05
STEPS = 40

Restore = Callable[[Tensor, Any, nn.Module], Tensor]
"""(measurement, physics, denoiser) → picture."""


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path, help="grey picture to restore")
    parser.add_argument("--target", default="127.0.0.1:50051", help="address of the server")
    parser.add_argument("--model", default="fashion-els", help="name of the model")
    parser.add_argument("--label", type=int, default=-1, help="label; -1 for none")
    parser.add_argument("--out", type=Path, default=Path("restored.png"), help="picture to write")
    arguments = parser.parse_args()
    with Image.open(arguments.picture) as picture:
        image = torch.from_numpy(np.asarray(picture.convert("L"), np.float32) / 255)[None, None]
    rows = []
    with Client(arguments.target) as client:
        denoiser = DeepinvDenoiser(client, arguments.model, arguments.label)
        for name, (physics, restore) in tasks(image).items():
            measured, restored = restoration(image, physics, restore, denoiser)
            print(
                f"{name}: {psnr(measured, image):.1f} dB, {psnr(restored, image):.1f} dB restored"
            )
            rows.append(torch.cat([image, measured, restored], dim=3))
    grid = torch.cat(rows, dim=2)[0, 0].clamp(0, 1) * 255
    Image.fromarray(grid.round().byte().numpy()).save(arguments.out)


def tasks(image: Tensor) -> dict[str, tuple[Any, Restore]]:
    """Return measurement and restoration of a picture [1, 1, H, W] in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    noise = deepinv.physics.GaussianNoise(NOISE, rng=torch.Generator().manual_seed(1))
    shape = tuple(image.shape[1:])
    mask = (torch.rand(1, *shape, generator=generator) < 0.5).float()
    kernel = deepinv.physics.functional.blur.gaussian_blur(sigma=1.5)
    blur = deepinv.physics.BlurFFT(shape, filter=kernel, noise_model=noise)
    hide = deepinv.physics.Inpainting(shape, mask=mask, noise_model=noise)
    return {
        "deblurring (plug-and-play)": (blur, plug_and_play),
        "inpainting (DPS)": (hide, posterior_sample),
    }


def restoration(
    image: Tensor, physics: Any, restore: Restore, denoiser: nn.Module
) -> tuple[Tensor, Tensor]:
    """Return measurement and restored picture, both like ``image``."""
    measured = physics(image)
    return measured, restore(measured, physics, denoiser)


def plug_and_play(measured: Tensor, physics: Any, denoiser: nn.Module) -> Tensor:
    """Return the picture by half-quadratic splitting with falling noise levels (DPIR)."""
    restored: Tensor = deepinv.optim.DPIR(NOISE, denoiser=denoiser)(measured, physics)
    return restored


def posterior_sample(measured: Tensor, physics: Any, denoiser: nn.Module) -> Tensor:
    """Return a sample of diffusion posterior sampling.

    By default deepinv's guidance hardly sees the measurement; annealed, its weight is near 1.
    """
    sampler = deepinv.sampling.DPS(
        denoiser, num_steps=STEPS, guidance="annealed", rng=torch.Generator()
    )
    drawn: Tensor = sampler(measured, physics, seed=0)
    return drawn.float()


def pseudoinverse_guided(measured: Tensor, physics: Any, denoiser: nn.Module) -> Tensor:
    """Return a sample of pseudoinverse guidance (ΠGDM), which calls ``torch.func.vjp``."""
    sampler = deepinv.sampling.PosteriorDiffusion(
        data_fidelity=deepinv.sampling.PiGDMDataFidelity(),
        denoiser=denoiser,
        sde=deepinv.sampling.VariancePreservingDiffusion(dtype=torch.float64),
        solver=deepinv.sampling.DDIMSolver(
            timesteps=torch.linspace(1, 0, STEPS, dtype=torch.float64), rng=torch.Generator()
        ),
    )
    drawn: Tensor = sampler(measured, physics, seed=0)
    return drawn.float()


def psnr(found: Tensor, image: Tensor) -> float:
    """Return the peak signal-to-noise ratio of a picture in [0, 1] in dB."""
    return float(deepinv.metric.PSNR()(found.clamp(0, 1), image))


if __name__ == "__main__":
    main()
