"""New pictures from one picture in float64, by matrix products over patches: the specification."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import fold, interpolate, unfold

from els_service.denoisers.noise import seeded_noise

Size = tuple[int, int]


def denoise(
    x: Tensor, images: Sequence[Tensor], alpha: float, sigma: float, patch: int, rho: float
) -> Tensor:
    """D of x [C, H, W] by the patches wholly inside images [C, h, w]."""
    keys = torch.cat([unfold(image.double()[None], patch)[0].T for image in images])
    queries = unfold(x.double()[None], patch)[0].T
    logits = (alpha * queries @ keys.T - alpha**2 / 2 * keys.square().sum(1)) / sigma**2
    means = logits.softmax(1) @ keys
    place = torch.linspace(-1, 1, patch, dtype=torch.float64)
    g = torch.exp(-(place[:, None] ** 2 + place**2) / (2 * rho**2)).flatten()
    weights = g.repeat(x.shape[0])
    size = (x.shape[1], x.shape[2])
    total = fold((means * weights).T[None], size, patch)
    return (total / fold(weights.repeat(len(means), 1).T[None], size, patch))[0]


def resized(image: Tensor, size: Size) -> Tensor:
    return interpolate(image[None], size, mode="bicubic", align_corners=False, antialias=True)[0]


def repeated(image: Tensor, size: Size) -> Tensor:
    """Resampled as one of many copies on all sides."""
    larger = resized(image.repeat(1, 3, 3), (3 * size[0], 3 * size[1]))
    return larger[:, size[0] : 2 * size[0], size[1] : 2 * size[1]]


def smooth_edges(image: Tensor) -> Tensor:
    """Rolled so that the neighbours that differ least are its edges."""
    for axis in (1, 2):
        inside = image.diff(dim=axis).abs().mean(dim=(0, 3 - axis))
        edge = (image.select(axis, 0) - image.select(axis, -1)).abs().mean()
        if inside.min() < edge:
            image = image.roll(-int(inside.argmin()) - 1, axis)
    return image


def draw(
    scales: Sequence[Sequence[Tensor]],
    sizes: Sequence[Size],
    *,
    seed: int,
    image: int = 0,
    patch: int,
    rho: float,
    steps: int,
    tileable: bool = False,
) -> list[Tensor]:
    """x after every step of every scale, by the formulas of DDIM with σ = 1 - α."""
    channels = scales[0][0].shape[0]
    numbers = seeded_noise(seed, 1, (channels, *sizes[-1]), image)
    coarse: Tensor | None = None
    states = []
    for scale, size in enumerate(sizes):
        x = numbers(scale).flatten()[: channels * math.prod(size)].reshape(channels, *size)
        alphas = torch.linspace(0, 1 - 1e-4, steps, dtype=torch.float64).tolist()
        for step, alpha in enumerate(alphas):
            sigma = 1 - alpha
            if tileable and step == steps - 1:
                x = smooth_edges(x)
            around = x
            if tileable:
                # On the torus every patch is inside a picture that is repeated on all sides.
                around = x.repeat(1, 3, 3)
            x_hat = denoise(around, scales[scale], alpha, sigma, patch, rho)
            if tileable:
                x_hat = x_hat[:, size[0] : 2 * size[0], size[1] : 2 * size[1]]
            epsilon = (x - alpha * x_hat) / sigma
            if step == steps - 1:
                x = x_hat
                states.append(x)
                break
            if coarse is not None:
                resample = repeated if tileable else resized
                down = resample(resample(x_hat, sizes[scale - 1]), size)
                x_hat = resample(coarse, size) + x_hat - down
            x = alphas[step + 1] * x_hat + (1 - alphas[step + 1]) * epsilon
            states.append(x / math.hypot(alphas[step + 1], 1 - alphas[step + 1]))
        coarse = x
    return states
