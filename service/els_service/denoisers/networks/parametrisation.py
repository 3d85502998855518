"""Conversion between a network's prediction and D(x) = E[x0 | x], for inference and training.

Every parametrisation is ``D(x) = c_skip·x + c_out·F(c_in·x, t)`` (Karras et al. 2022, eq. 7). With
ā = a/√(a² + s²), s̄ = s/√(a² + s²) and σ = s/a, for x = a·x0 + s·ε:

| prediction | F is                  | c_in           | c_skip               | c_out           |
|------------|-----------------------|----------------|----------------------|-----------------|
| ``eps``    | ε                     | 1/√(a² + s²)   | 1/a                  | -s/a            |
| ``x0``     | x0                    | 1/√(a² + s²)   | 0                    | 1               |
| ``v``      | ā·ε - s̄·x0            | 1/√(a² + s²)   | ā/√(a² + s²)         | -s̄              |
| ``edm``    | preconditioned, [1]   | 1/(a√(σ²+σd²)) | σd²/(σ²+σd²)/a       | σσd/√(σ²+σd²)   |
| ``flow``   | ε - x0                | 1/(a + s)      | 1/(a + s)            | -s/(a + s)      |

v: Salimans & Ho 2022. [1] Karras et al. 2022, table 1, with ``sigma_data`` σd. flow: the velocity
of x = (1-t)·x0 + t·ε, Liu et al. 2023. The network's input t is the time of its schedule at the
same σ, for any convention of the noise level.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from els_service.denoisers.levels import Floats, NoiseLevel, cosine, cosine_time

MIN_TIME = 1e-3
"""Lowest time t of training; the highest is 1."""
_MAX_SIGMA = float(cosine(np.ones(1)).sigma[0])


@dataclass(frozen=True, eq=False)
class Parametrisation:
    """Coefficients of ``D(x) = c_skip·x + c_out·F(c_in·x, t)``, each [B] float64."""

    c_in: Floats
    c_skip: Floats
    c_out: Floats
    sigma: Floats
    """s/a of c_in·x, at most the highest trained level."""
    scale: Floats
    """scale·x is the input with a² + s² = 1 at ``sigma``."""

    @property
    def time(self) -> Floats:
        """Time of ``sigma`` on the cosine schedule, MIN_TIME ≤ t ≤ 1."""
        # In a third of the time of np.clip, for a few numbers.
        time: Floats = np.minimum(np.maximum(cosine_time(self.sigma), MIN_TIME), 1.0)
        return time


def parametrise(
    prediction: str, level: NoiseLevel, sigma_data: float = 0.5, *, max_sigma: float = _MAX_SIGMA
) -> Parametrisation:
    """Return the coefficients at a noise level.

    Above the trained levels x is scaled down to the highest: D hardly depends on x there, while the
    error of an untrained ε would be multiplied by σ. Below the lowest only the time is clamped.

    Args:
        prediction: one of ``PREDICTIONS``.
        level: noise level of each image, [B].
        sigma_data: standard deviation of the data, for ``edm``.
        max_sigma: highest trained s/a; the default 80.2 is that of the cosine schedule at t = 1.
    """
    given_a, given_sigma = level.a, level.sigma
    sigma = np.minimum(given_sigma, max_sigma)
    shrink = sigma / (given_sigma * given_a)
    a = 1 / np.sqrt(1 + sigma**2)
    c_in, c_skip, c_out = PREDICTIONS[prediction](a, a * sigma, sigma_data)
    # The table is written for a² + s² = 1; x·shrink·a is x in that scale.
    scale = shrink * a
    return Parametrisation(c_in * scale, c_skip * scale, c_out, sigma, scale)


_Coefficients = tuple[Floats | float, Floats, Floats]


def _eps(a: Floats, s: Floats, _: float) -> _Coefficients:
    return 1.0, 1 / a, -s / a


def _x0(a: Floats, s: Floats, _: float) -> _Coefficients:
    return 1.0, np.zeros_like(a), np.ones_like(a)


def _v(a: Floats, s: Floats, _: float) -> _Coefficients:
    return 1.0, a, -s


def _edm(a: Floats, s: Floats, sigma_data: float) -> _Coefficients:
    sigma = s / a
    total = sigma**2 + sigma_data**2
    root = np.sqrt(total)
    return 1 / (a * root), sigma_data**2 / (total * a), sigma * sigma_data / root


def _flow(a: Floats, s: Floats, _: float) -> _Coefficients:
    total = a + s
    return 1 / total, 1 / total, -s / total


PREDICTIONS: dict[str, Callable[[Floats, Floats, float], _Coefficients]] = {
    "eps": _eps,
    "x0": _x0,
    "v": _v,
    "edm": _edm,
    "flow": _flow,
}
"""a, s (a² + s² = 1) and σd → c_in, c_skip, c_out."""
