"""Noise levels of a network trained at integer timesteps, and its time input at other levels.

Between two timesteps the time input is interpolated linearly in log σ: sinusoids of time are
smooth, and at trained levels the value is the timestep itself. Outside the range it is clamped.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from els_service.denoisers.levels import MAX_SIGMA, MIN_SIGMA, Floats, NoiseLevel


@dataclass(frozen=True, eq=False)
class Timesteps:
    """The levels of timesteps 0 … T-1.

    Raises:
        ValueError: Fewer than two levels, not increasing, or out of range.
    """

    sigma: Floats = field(repr=False)
    """[T], s/a of each timestep."""
    whole: bool = False
    """Whether the network takes integer timesteps only; then the nearest in log σ is used."""

    def __post_init__(self) -> None:
        if len(self.sigma) < 2 or not (np.diff(self.sigma) > 0).all():
            raise ValueError("expected at least two noise levels that increase with the timestep")
        if not MIN_SIGMA <= self.sigma[0] <= self.sigma[-1] <= MAX_SIGMA:
            ends = f"{self.sigma[0]:g} to {self.sigma[-1]:g}"
            raise ValueError(f"expected s/a from {MIN_SIGMA:g} to {MAX_SIGMA:g}, got {ends}")

    @property
    def min_sigma(self) -> float:
        """s/a of timestep 0."""
        return float(self.sigma[0])

    @property
    def max_sigma(self) -> float:
        """s/a of the last timestep."""
        return float(self.sigma[-1])

    def at(self, sigma: Floats) -> Floats:
        """Return the time input at s/a = ``sigma``: 0 ≤ timestep ≤ T-1."""
        count = np.arange(len(self.sigma))
        timestep = np.interp(np.log(sigma), np.log(self.sigma), count)
        return np.round(timestep) if self.whole else timestep

    def schedule(self, time: Floats) -> NoiseLevel:
        """Return the level at 0 < t ≤ 1, timestep T·t - 1 (spacing "trailing" in diffusers)."""
        count = len(self.sigma)
        sigma = np.exp(np.interp(count * time - 1, np.arange(count), np.log(self.sigma)))
        a = 1 / np.sqrt(1 + sigma**2)
        return NoiseLevel(a, sigma * a)
