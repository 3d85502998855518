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

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from els_service.denoisers.levels import Floats, NoiseLevel, cosine, cosine_time

MIN_TIME = 1e-3
"""Lowest time t of training; the highest is 1."""
_MAX_SIGMA = float(cosine(np.ones(1)).sigma[0])


class Parametrisation:
    """Coefficients of ``D(x) = c_skip·x + c_out·F(c_in·x, t)``.

    Args:
        numbers: c_in, c_skip, c_out, sigma and scale of each image, [5, B] float64.

    Attributes:
        c_in, c_skip, c_out: [B] float64.
        sigma: s/a of c_in·x, at most the highest trained level, [B] float64.
        scale: scale·x is the input with a² + s² = 1 at ``sigma``, [B] float64.
    """

    __slots__ = ("_numbers", "c_in", "c_out", "c_skip", "scale", "sigma")

    def __init__(self, numbers: Floats) -> None:
        self._numbers = numbers
        self.c_in, self.c_skip, self.c_out, self.sigma, self.scale = numbers

    @property
    def rows(self) -> npt.NDArray[np.float32]:
        """c_in, c_skip and c_out as factors of images, [3, B, 1, 1, 1]."""
        return self._numbers[:3].astype(np.float32).reshape(3, -1, 1, 1, 1)

    @property
    def time(self) -> Floats:
        """Time of ``sigma`` on the cosine schedule, MIN_TIME ≤ t ≤ 1, [B] float64."""
        if len(self.sigma) == 1:
            return np.array([min(max(float(cosine_time(self.sigma)[0]), MIN_TIME), 1.0)])
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
    predict = PREDICTIONS[prediction]
    if len(level) != 1:
        sigma = np.minimum(level.sigma, max_sigma)
        numbers = _coefficients(predict, level.a, level.sigma, sigma, sigma_data, np.sqrt)
        return Parametrisation(np.array(numbers))
    # The same arithmetic, of plain numbers: beside a network of a millisecond arrays take too long.
    ((a, s),) = level.pairs
    numbers = _coefficients(predict, a, s / a, min(s / a, max_sigma), sigma_data, math.sqrt)
    return Parametrisation(np.array(numbers)[:, np.newaxis])


_Numbers = Any
"""A float, or one for each image: [B] float64."""
_Coefficients = tuple[_Numbers, _Numbers, _Numbers]
_Root = Callable[[_Numbers], _Numbers]
_Prediction = Callable[[_Numbers, _Numbers, float, _Root], _Coefficients]


def _coefficients(
    predict: _Prediction,
    given_a: _Numbers,
    given_sigma: _Numbers,
    sigma: _Numbers,
    sigma_data: float,
    sqrt: _Root,
) -> list[_Numbers]:
    """Return the numbers of a ``Parametrisation``.

    Squares are products: a power of 2 rounds differently for floats than for arrays.
    """
    shrink = sigma / (given_sigma * given_a)
    a = 1 / sqrt(1 + sigma * sigma)
    c_in, c_skip, c_out = predict(a, a * sigma, sigma_data, sqrt)
    # The table is written for a² + s² = 1; x·shrink·a is x in that scale.
    scale = shrink * a
    return [c_in * scale, c_skip * scale, c_out, sigma, scale]


def _eps(a: _Numbers, s: _Numbers, _: float, __: _Root) -> _Coefficients:
    return 1.0, 1 / a, -s / a


def _x0(a: _Numbers, s: _Numbers, _: float, __: _Root) -> _Coefficients:
    return 1.0, 0 * a, a / a


def _v(a: _Numbers, s: _Numbers, _: float, __: _Root) -> _Coefficients:
    return 1.0, a, -s


def _edm(a: _Numbers, s: _Numbers, sigma_data: float, sqrt: _Root) -> _Coefficients:
    sigma = s / a
    total = sigma * sigma + sigma_data * sigma_data
    root = sqrt(total)
    return 1 / (a * root), sigma_data**2 / (total * a), sigma * sigma_data / root


def _flow(a: _Numbers, s: _Numbers, _: float, __: _Root) -> _Coefficients:
    total = a + s
    return 1 / total, 1 / total, -s / total


PREDICTIONS: dict[str, _Prediction] = {
    "eps": _eps,
    "x0": _x0,
    "v": _v,
    "edm": _edm,
    "flow": _flow,
}
"""a, s (a² + s² = 1) and σd → c_in, c_skip, c_out."""
