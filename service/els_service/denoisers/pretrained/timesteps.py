"""The levels of a network that was trained at whole timesteps, and what it is told of others.

Between two timesteps the network is told a fraction of a step, linear in log σ: sinusoids of time
are smooth, and at the trained levels it is the timestep itself. Beyond the ends the end is held.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from els_service.denoisers.levels import MAX_SIGMA, MIN_SIGMA, Floats, NoiseLevel


@dataclass(frozen=True, eq=False)
class Timesteps:
    """The levels of timesteps 0 … T-1.

    Raises:
        ValueError: They are fewer than two, do not increase, or are out of range.
    """

    sigma: Floats = field(repr=False)
    """[T], s/a of each timestep."""
    whole: bool = False
    """Whether the network can be told whole timesteps alone; then the nearest in log σ."""

    def __post_init__(self) -> None:
        if len(self.sigma) < 2 or not (np.diff(self.sigma) > 0).all():
            raise ValueError("expected at least two noise levels that increase with the timestep")
        if not MIN_SIGMA <= self.sigma[0] <= self.sigma[-1] <= MAX_SIGMA:
            ends = f"{self.sigma[0]:g} to {self.sigma[-1]:g}"
            raise ValueError(f"expected s/a from {MIN_SIGMA:g} to {MAX_SIGMA:g}, got {ends}")

    @property
    def max_sigma(self) -> float:
        """s/a of the last timestep."""
        return float(self.sigma[-1])

    def at(self, sigma: Floats) -> Floats:
        """Return what the network is told at s/a = ``sigma``: 0 ≤ timestep ≤ T-1."""
        count = np.arange(len(self.sigma))
        timestep = np.interp(np.log(sigma), np.log(self.sigma), count)
        return np.round(timestep) if self.whole else timestep

    def schedule(self, time: Floats) -> NoiseLevel:
        """Return the level at 0 < t ≤ 1, which is timestep T·t - 1 ("trailing" in diffusers)."""
        count = len(self.sigma)
        sigma = np.exp(np.interp(count * time - 1, np.arange(count), np.log(self.sigma)))
        a = 1 / np.sqrt(1 + sigma**2)
        return NoiseLevel(a, sigma * a)
