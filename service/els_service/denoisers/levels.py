"""Noise levels: ``x = a·x0 + s·ε`` with one (a, s) for each image, given by one of three names.

| name        | a    | s        | range      | convention                                  |
|-------------|------|----------|------------|---------------------------------------------|
| `sigma`     | 1    | σ        | 0 < σ < ∞  | variance exploding: EDM, k-diffusion        |
| `alpha_bar` | √ᾱ   | √(1-ᾱ)   | 0 < ᾱ < 1  | variance preserving: DDPM, DDIM             |
| `time`      | from the schedule | | 0 < t ≤ 1 | the schedule of Kamb & Ganguli: cosine    |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from els_service.errors import InvalidArgumentError

Floats = npt.NDArray[np.float64]
Pair = tuple[float, float]
"""(a, s) of one image."""

MIN_SIGMA, MAX_SIGMA = 1e-4, 1e6
"""Range of s/a for which float32 logits are finite and results are meaningful."""


class NoiseLevel:
    """Signal scale ``a`` and noise scale ``s`` of each image, both positive; immutable.

    Held as plain floats until arrays are needed: for one image, arrays cost more than the
    arithmetic of a simple denoiser.

    Args:
        a: [B] float64.
        s: [B] float64.
    """

    __slots__ = ("_arrays", "_pairs")

    def __init__(self, a: Floats, s: Floats) -> None:
        self._arrays: tuple[Floats, Floats] | None = (a, s)
        self._pairs: Sequence[Pair] | None = None

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> NoiseLevel:
        """Return the level of images with these (a, s)."""
        level = cls.__new__(cls)
        level._pairs, level._arrays = pairs, None
        return level

    @property
    def pairs(self) -> Sequence[Pair]:
        """(a, s) of each image, plain floats."""
        if self._pairs is None:
            a, s = self._both()
            self._pairs = list(zip(a.tolist(), s.tolist(), strict=True))
        return self._pairs

    @property
    def a(self) -> Floats:
        """Signal scales, [B] float64; read-only where made from pairs."""
        return self._both()[0]

    @property
    def s(self) -> Floats:
        """Noise scales, [B] float64; read-only where made from pairs."""
        return self._both()[1]

    def _both(self) -> tuple[Floats, Floats]:
        if self._arrays is None:
            columns = np.array(self._pairs, np.float64).reshape(-1, 2).T.copy()
            columns.flags.writeable = False
            self._arrays = columns[0], columns[1]
        return self._arrays

    def __len__(self) -> int:
        # One of the two is always there, which the types do not say.
        return len(self._arrays[0] if self._pairs is None else self._pairs)  # type: ignore[index]  # as above

    def __getitem__(self, images: slice) -> NoiseLevel:
        if self._pairs is not None:
            return NoiseLevel.of(self._pairs[images])
        return NoiseLevel(self.a[images], self.s[images])

    @property
    def sigma(self) -> Floats:
        """Noise-to-signal ratio s/a of each image, [B] float64."""
        a, s = self._both()
        return s / a

    @property
    def alpha_bar(self) -> Floats:
        """ᾱ of the variance-preserving problem with the same s/a: a²/(a² + s²)."""
        return self.a**2 / (self.a**2 + self.s**2)

    def repeat(self, count: int) -> NoiseLevel:
        """Return a level for ``count`` images from one for a single image."""
        return self if len(self) == count else NoiseLevel.of(list(self.pairs) * count)


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
    pairs = [(1.0, float(value)) for value in sigma]
    for _, value in pairs:
        if not MIN_SIGMA <= value <= MAX_SIGMA:
            raise _out_of_range("sigma", value)
    return NoiseLevel.of(pairs)


def from_alpha_bar(alpha_bar: Sequence[float] | Floats) -> NoiseLevel:
    """Return the variance-preserving level a = √ᾱ, s = √(1-ᾱ).

    Raises:
        InvalidArgumentError: A value is outside 0 < ᾱ < 1, or its s/a is out of range.
    """
    values = list(map(float, alpha_bar))
    for value in values:
        if not 0 < value < 1:
            raise InvalidArgumentError("level.alpha_bar", "0 < alpha_bar < 1", value)
    pairs = [(math.sqrt(value), math.sqrt(1 - value)) for value in values]
    _check("alpha_bar", values, [s / a for a, s in pairs])
    return NoiseLevel.of(pairs)


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


def _check(name: str, values: list[float], sigmas: list[float]) -> None:
    for value, sigma in zip(values, sigmas, strict=True):
        if not MIN_SIGMA <= sigma <= MAX_SIGMA:
            raise _out_of_range(name, value)


def _out_of_range(name: str, value: float) -> InvalidArgumentError:
    expected = f"s/a from {MIN_SIGMA:g} to {MAX_SIGMA:g}"
    return InvalidArgumentError(f"level.{name}", expected, value)
