"""Noise levels: ``x = a·x0 + s·ε`` with one (a, s) for each image, given by one of three names.

| name        | a    | s        | range      | convention                                  |
|-------------|------|----------|------------|---------------------------------------------|
| `sigma`     | 1    | σ        | 0 < σ < ∞  | variance exploding: EDM, k-diffusion        |
| `alpha_bar` | √ᾱ   | √(1-ᾱ)   | 0 < ᾱ < 1  | variance preserving: DDPM, DDIM             |
| `time`      | from the schedule | | 0 < t ≤ 1 | the schedule of Kamb & Ganguli: cosine    |
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from els_service.errors import InvalidArgumentError

Floats = npt.NDArray[np.float64]

MIN_SIGMA, MAX_SIGMA = 1e-4, 1e6
"""Range of s/a for which float32 logits are finite and results are meaningful."""


@dataclass(eq=False, slots=True)  # immutable; frozen: 5 times slower to construct
class NoiseLevel:
    """Signal scale ``a`` and noise scale ``s`` of each image, [B] float64, both positive."""

    a: Floats
    s: Floats

    def __len__(self) -> int:
        return len(self.a)

    def __getitem__(self, images: slice) -> NoiseLevel:
        return NoiseLevel(self.a[images], self.s[images])

    @property
    def sigma(self) -> Floats:
        """Noise-to-signal ratio s/a of each image."""
        return self.s / self.a

    @property
    def alpha_bar(self) -> Floats:
        """ᾱ of the variance-preserving problem with the same s/a: a²/(a² + s²)."""
        return self.a**2 / (self.a**2 + self.s**2)

    def repeat(self, count: int) -> NoiseLevel:
        """Return a level for ``count`` images from one for a single image."""
        return (
            self if len(self) == count else NoiseLevel(self.a.repeat(count), self.s.repeat(count))
        )


Schedule = Callable[[Floats], NoiseLevel]
"""Time 0 < t ≤ 1, [B] → level, variance preserving."""


def cosine(t: Floats) -> NoiseLevel:
    """Return the level at time t: ᾱ(t) = cos²(πt / (2·1.008)), without cancellation near 0."""
    angle = np.pi * t / (2 * 1.008)
    return NoiseLevel(np.cos(angle), np.sin(angle))


def cosine_time(sigma: Floats) -> Floats:
    """Return the time at which the cosine schedule has s/a = ``sigma``."""
    return np.arctan(sigma) * (2 * 1.008 / np.pi)


SCHEDULES: dict[str, Schedule] = {"cosine": cosine}


def from_sigma(sigma: Sequence[float] | Floats) -> NoiseLevel:
    """Return the variance-exploding level a = 1, s = σ.

    Raises:
        InvalidArgumentError: A value is outside ``MIN_SIGMA … MAX_SIGMA``.
    """
    values = list(sigma)
    for value in values:
        if not MIN_SIGMA <= value <= MAX_SIGMA:
            raise _out_of_range("sigma", value)
    return NoiseLevel(_ones(len(values)), np.array(values, np.float64))


def from_alpha_bar(alpha_bar: Sequence[float] | Floats) -> NoiseLevel:
    """Return the variance-preserving level a = √ᾱ, s = √(1-ᾱ).

    Raises:
        InvalidArgumentError: A value is outside 0 < ᾱ < 1, or its s/a is out of range.
    """
    values = np.array(alpha_bar, np.float64)
    for value in values.tolist():
        if not 0 < value < 1:
            raise InvalidArgumentError("level.alpha_bar", "0 < alpha_bar < 1", value)
    level = NoiseLevel(np.sqrt(values), np.sqrt(1 - values))
    _check("alpha_bar", values.tolist(), level.sigma.tolist())
    return level


def from_time(time: Sequence[float] | Floats, schedule: Schedule = cosine) -> NoiseLevel:
    """Return the level of a schedule at time t.

    Raises:
        InvalidArgumentError: A value is outside 0 < t ≤ 1, or its s/a is out of range.
    """
    values = np.array(time, np.float64)
    for value in values.tolist():
        if not 0 < value <= 1:
            raise InvalidArgumentError("level.time", "0 < time <= 1", value)
    level = schedule(values)
    _check("time", values.tolist(), level.sigma.tolist())
    return level


@functools.lru_cache(1024)
def _ones(count: int) -> Floats:
    ones = np.ones(count)
    ones.flags.writeable = False
    return ones


def _check(name: str, values: list[float], sigmas: list[float]) -> None:
    # Python floats: faster than array arithmetic for the usual single level.
    for value, sigma in zip(values, sigmas, strict=True):
        if not MIN_SIGMA <= sigma <= MAX_SIGMA:
            raise _out_of_range(name, value)


def _out_of_range(name: str, value: float) -> InvalidArgumentError:
    expected = f"s/a from {MIN_SIGMA:g} to {MAX_SIGMA:g}"
    return InvalidArgumentError(f"level.{name}", expected, value)
