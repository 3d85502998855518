"""Time inputs of networks: σ = s/a ↔ the number that a network takes for its noise level.

| class       | number                          | σ                                       | source |
|-------------|---------------------------------|-----------------------------------------|--------|
| `Timesteps` | 0 … T-1, of discrete training   | √(1/ᾱ - 1), ᾱ = Π (1 - β)               | [1]    |
| `FlowTime`  | scale·t, 0 < t < 1              | t/(1-t), as x = (1-t)·x0 + t·ε          | [2]    |
| `EdmTime`   | ln(σ)/4                         | σ                                       | [3]    |

[1] Ho et al. 2020; betas also of Rombach et al. 2022 (scaled_linear) and Nichol & Dhariwal 2021
(squaredcos_cap_v2). [2] Lipman et al. 2023, Liu et al. 2023; shift: Esser et al. 2024, eq. 23.
[3] Karras et al. 2022, table 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from els_service.denoisers.levels import MAX_SIGMA, MIN_SIGMA, Floats, NoiseLevel
from els_service.denoisers.pretrained.timesteps import Timesteps

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
"""Names of beta schedules, as in diffusers."""
MAX_TIMESTEPS = 100_000


class TimeInput(Protocol):
    """Time input of a network."""

    @property
    def whole(self) -> bool:
        """Whether the network takes integers only."""
        ...

    @property
    def min_sigma(self) -> float:
        """Lowest trained s/a."""
        ...

    @property
    def max_sigma(self) -> float:
        """Highest trained s/a."""
        ...

    def at(self, sigma: Floats) -> Floats:
        """Return the time input at s/a = ``sigma``, clamped to the trained range."""
        ...

    def schedule(self, time: Floats) -> NoiseLevel:
        """Return the trained level at 0 < t ≤ 1, variance preserving; the highest at 1."""
        ...


@dataclass(frozen=True)
class FlowTime:
    """Time of a flow-matching network: scale·t with x = (1-t)·x0 + t·ε.

    t = 1 is pure noise, whose σ is infinite: levels end at ``MAX_SIGMA``.
    """

    scale: float = 1000.0
    shift: float = 1.0
    """Of the levels at evenly spaced times: t → shift·t / (1 + (shift-1)·t)."""
    whole: bool = False
    """Whether the network takes integers only; then the nearest is used."""

    @property
    def min_sigma(self) -> float:
        """Lowest s/a; a flow is trained down to none."""
        return MIN_SIGMA

    @property
    def max_sigma(self) -> float:
        """s/a above which no image of a training set is visible any more."""
        return MAX_SIGMA

    def at(self, sigma: Floats) -> Floats:
        """Return scale·t, 0 < t ≤ 1; 1 at ``MAX_SIGMA``."""
        # A step of 1e-6 would be seen: scale·t is the phase of sinusoids.
        is_noise = sigma >= MAX_SIGMA * (1 - 1e-9)
        time = self.scale * np.where(is_noise, 1.0, sigma / (1 + sigma))
        return np.round(time) if self.whole else time

    def schedule(self, time: Floats) -> NoiseLevel:
        """Return the level at 0 < t ≤ 1 after the shift."""
        noise = self.shift * time / (1 + (self.shift - 1) * time)
        signal = np.maximum(1 - noise, noise / MAX_SIGMA)
        return _preserving(np.maximum(noise / signal, MIN_SIGMA))


@dataclass(frozen=True)
class EdmTime:
    """Time of an EDM network: ln(σ)/4; its levels at evenly spaced times are Karras' eq. 5."""

    min_sigma: float = 0.002
    max_sigma: float = 80.0
    rho: float = 7.0
    whole: bool = False
    """An EDM network takes real numbers."""

    def at(self, sigma: Floats) -> Floats:
        """Return ln(σ)/4 of the nearest trained σ."""
        return np.log(np.clip(sigma, self.min_sigma, self.max_sigma)) / 4

    def schedule(self, time: Floats) -> NoiseLevel:
        """Return the level at 0 < t ≤ 1: from ``min_sigma`` to ``max_sigma``."""
        lowest, highest = self.min_sigma ** (1 / self.rho), self.max_sigma ** (1 / self.rho)
        return _preserving((lowest + time * (highest - lowest)) ** self.rho)


def timesteps_of(betas: Sequence[float]) -> Timesteps:
    """Return the timesteps of betas, [T].

    Raises:
        ValueError: Fewer than two, too many, outside 0 < β < 1, or σ out of range.
    """
    if not 2 <= len(betas) <= MAX_TIMESTEPS or not all(0 < beta < 1 for beta in betas):
        raise ValueError(f"expected 2 to {MAX_TIMESTEPS} numbers in 0 < beta < 1")
    # In float32 up to here, as the networks were trained.
    alpha_bar = torch.cumprod(1 - torch.tensor(betas, dtype=torch.float32), 0).double().numpy()
    with np.errstate(divide="ignore"):
        return Timesteps(np.sqrt((1 - alpha_bar) / alpha_bar))


def betas_of(kind: str, count: int, start: float = 1e-4, end: float = 0.02) -> list[float]:
    """Return the betas of a named schedule, [count].

    Args:
        kind: one of ``BETA_SCHEDULES``.
        count: number of timesteps T.
        start: first beta; ``squaredcos_cap_v2`` has none.
        end: last beta, likewise.
    """
    if kind == "squaredcos_cap_v2":
        ends = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
        return [min(1 - after / before, 0.999) for before, after in itertools.pairwise(ends)]
    if kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
    elif kind == "sigmoid":
        betas = torch.sigmoid(torch.linspace(-6, 6, count)) * (end - start) + start
    else:
        betas = torch.linspace(start, end, count, dtype=torch.float32)
    return [float(beta) for beta in betas]


def _preserving(sigma: Floats) -> NoiseLevel:
    a = 1 / np.sqrt(1 + sigma**2)
    return NoiseLevel(a, sigma * a)
