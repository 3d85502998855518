"""Jacobian products and explanations as denoisers: queued, with a deadline and a watchdog.

Each computation has a queue and a cost model of its own. Images and their directions travel as one
query, which the scheduler splits, joins and halves like any other.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from els_kernels import MAX_SOURCES
from els_service.denoisers.base import Denoised, Denoiser, DenoiserInfo, Query
from els_service.denoisers.explanations import Explainable, Explanation
from els_service.denoisers.gradients import Differentiable, Direction, Product

Computation = Literal["vjp", "jvp", "explain", "variance"]
COMPUTATIONS: tuple[Computation, ...] = ("vjp", "jvp", "explain", "variance")


def derived(denoiser: Denoiser, computation: Computation) -> Denoiser | None:
    """Return the denoiser of a computation; None if the denoiser does not support it."""
    if computation == "explain":
        return ExplainerAsDenoiser(denoiser) if isinstance(denoiser, Explainable) else None
    if computation == "variance":
        return VarianceAsDenoiser(denoiser) if isinstance(denoiser, Explainable) else None
    if isinstance(denoiser, Differentiable):
        return ProductAsDenoiser(denoiser, computation)
    return None


def with_direction(query: Query, direction: npt.NDArray[np.float32]) -> Query:
    """Return the query of a product: pixels [B, 2C, H, W], those of x before the direction."""
    pixels = np.concatenate([query.pixels, direction], axis=1)
    return replace(query, pixels=pixels)


def product_of(answer: Denoised) -> Product:
    """Return the product in the answer to such a query."""
    channels = answer.pixels.shape[1] // 2
    return Product(answer.pixels[:, :channels], answer.pixels[:, channels:])


class ProductAsDenoiser:
    """Denoiser whose result for a ``with_direction`` is D(x) before the Jacobian product.

    Args:
        denoiser: denoiser with products.
        direction: which product.
    """

    def __init__(self, denoiser: Differentiable, direction: Direction) -> None:
        self._denoiser, self._direction = denoiser, direction

    @property
    def info(self) -> DenoiserInfo:
        """Description of the denoiser."""
        return self._denoiser.info

    def check(self, query: Query) -> None:
        """Raise InvalidArgumentError if the denoiser rejects x."""
        self._denoiser.check(_split(query)[0])

    def predict_seconds(self, query: Query) -> float:
        """Return the denoiser's estimate of the product."""
        return self._denoiser.predict_product_seconds(_split(query)[0], self._direction)

    def denoise(self, query: Query) -> Denoised:
        """Return D(x) and the product, [B, 2C, H, W]."""
        x, along = _split(query)
        multiply = self._denoiser.vjp if self._direction == "vjp" else self._denoiser.jvp
        answer = multiply(x, along)
        return Denoised(np.concatenate([answer.mean, answer.product], axis=1), None)


class ExplainerAsDenoiser:
    """Denoiser whose result is an ``Explanation`` with ``MAX_SOURCES`` sources of each pixel.

    A query is one image, so that it is never split; others may join it in a batch.

    Args:
        denoiser: denoiser that explains.
    """

    def __init__(self, denoiser: Explainable) -> None:
        self._denoiser = denoiser

    @property
    def info(self) -> DenoiserInfo:
        """Description of the denoiser."""
        return self._denoiser.info

    def check(self, query: Query) -> None:
        """Raise InvalidArgumentError if the denoiser rejects x."""
        self._denoiser.check(query)

    def predict_seconds(self, query: Query) -> float:
        """Return the denoiser's estimate of an explanation."""
        return self._denoiser.predict_explain_seconds(query)

    def denoise(self, query: Query) -> Explanation:
        """Return the explanation."""
        return self._denoiser.explain(query, MAX_SOURCES)


class VarianceAsDenoiser:
    """Denoiser whose result is the posterior variance of each pixel, [B, C, H, W].

    Args:
        denoiser: denoiser that explains.
    """

    def __init__(self, denoiser: Explainable) -> None:
        self._denoiser = denoiser

    @property
    def info(self) -> DenoiserInfo:
        """Description of the denoiser."""
        return self._denoiser.info

    def check(self, query: Query) -> None:
        """Raise InvalidArgumentError if the denoiser rejects x."""
        self._denoiser.check(query)

    def predict_seconds(self, query: Query) -> float:
        """Return the denoiser's estimate of an explanation, which takes as long."""
        return self._denoiser.predict_explain_seconds(query)

    def denoise(self, query: Query) -> Denoised:
        """Return the variance."""
        return Denoised(self._denoiser.variance(query), None)


def _split(query: Query) -> tuple[Query, npt.NDArray[np.float32]]:
    """Return the query of x, and the direction."""
    channels = query.pixels.shape[1] // 2
    pixels = np.ascontiguousarray(query.pixels[:, :channels])
    x = replace(query, pixels=pixels)
    return x, query.pixels[:, channels:]
