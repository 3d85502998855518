"""Jacobian products and explanations as denoisers: queued, with a deadline and a watchdog.

Each computation has a queue and a cost model of its own. Images and their directions travel as one
query, which the scheduler splits, joins and halves like any other.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from els_kernels import MAX_SOURCES
from els_service.denoisers.base import Denoised, Denoiser, DenoiserInfo, Query
from els_service.denoisers.explanations import Explainable, Explanation
from els_service.denoisers.gradients import (
    Differentiable,
    Direction,
    Product,
    ReusesEvidence,
)
from els_service.denoisers.originality import HasBank, Originality, report

Computation = Literal[
    "vjp", "jvp", "explain", "variance", "evidence", "vjp_again", "jvp_again", "originality"
]
COMPUTATIONS: tuple[Computation, ...] = get_args(Computation)
AGAIN: dict[Direction, Computation] = {"vjp": "vjp_again", "jvp": "jvp_again"}
"""Product → its computation from evidence."""
DISTANCE_S = 1.7e-9
"""Seconds for each number of a bank, whose distance from an image is computed."""
REPORT_S = 3e-3
"""Seconds of the measures of the sources of an image; both are measured by ``python -m
benchmarks.originality --only cost``, and corrected by the queue's own cost model."""


def derived(denoiser: Denoiser, computation: Computation) -> Denoiser | None:
    """Return the denoiser of a computation; None if the denoiser does not support it."""
    if computation == "explain":
        return ExplainerAsDenoiser(denoiser) if isinstance(denoiser, Explainable) else None
    if computation == "variance":
        return VarianceAsDenoiser(denoiser) if isinstance(denoiser, Explainable) else None
    if computation == "originality":
        return OriginalityAsDenoiser(denoiser) if isinstance(denoiser, HasBank) else None
    if computation == "evidence":
        return EvidenceAsDenoiser(denoiser) if isinstance(denoiser, ReusesEvidence) else None
    if computation == "vjp_again":
        return _again(denoiser, "vjp")
    if computation == "jvp_again":
        return _again(denoiser, "jvp")
    if isinstance(denoiser, Differentiable):
        return ProductAsDenoiser(denoiser, computation)
    return None


def _again(denoiser: Denoiser, direction: Direction) -> Denoiser | None:
    if isinstance(denoiser, ReusesEvidence):
        return ProductAgainAsDenoiser(denoiser, direction)
    return None


def with_direction(query: Query, direction: npt.NDArray[np.float32]) -> Query:
    """Return the query of a product: pixels [B, 2C, H, W], those of x before the direction."""
    pixels = np.concatenate([query.pixels, direction], axis=1)
    return replace(query, pixels=pixels)


def with_evidence(query: Query, evidence: npt.NDArray[np.float64]) -> Query:
    """Return the query of a product from evidence [B, K, H, W]: [B, 2C + 2K, H, W].

    Args:
        query: ``with_direction``.
        evidence: float64, whose halves travel as float32 numbers.
    """
    pixels = np.concatenate([query.pixels, _halves(evidence)], axis=1)
    return replace(query, pixels=pixels)


def evidence_of(answer: Denoised) -> npt.NDArray[np.float64]:
    """Return the evidence in the answer of ``EvidenceAsDenoiser``, [B, K, H, W]."""
    return _whole(answer.pixels)


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


class EvidenceAsDenoiser:
    """Denoiser whose result is the evidence of x, as halves [B, 2K, H, W].

    Args:
        denoiser: denoiser with reusable evidence.
    """

    def __init__(self, denoiser: ReusesEvidence) -> None:
        self._denoiser = denoiser

    @property
    def info(self) -> DenoiserInfo:
        """Description of the denoiser."""
        return self._denoiser.info

    def check(self, query: Query) -> None:
        """Raise InvalidArgumentError if the denoiser rejects x."""
        self._denoiser.check(query)

    def predict_seconds(self, query: Query) -> float:
        """Return the denoiser's estimate."""
        return self._denoiser.predict_evidence_seconds(query)

    def denoise(self, query: Query) -> Denoised:
        """Return the evidence."""
        return Denoised(_halves(self._denoiser.evidence(query)), None)


class ProductAgainAsDenoiser:
    """Denoiser whose result for a ``with_evidence`` is that of ``ProductAsDenoiser``.

    Args:
        denoiser: denoiser with reusable evidence.
        direction: which product.
    """

    def __init__(self, denoiser: ReusesEvidence, direction: Direction) -> None:
        self._denoiser, self._direction = denoiser, direction

    @property
    def info(self) -> DenoiserInfo:
        """Description of the denoiser."""
        return self._denoiser.info

    def check(self, query: Query) -> None:
        """Raise InvalidArgumentError if the denoiser rejects x."""
        self._denoiser.check(self._parts(query)[0])

    def predict_seconds(self, query: Query) -> float:
        """Return the denoiser's estimate of the product."""
        return self._denoiser.predict_evidence_seconds(self._parts(query)[0])

    def denoise(self, query: Query) -> Denoised:
        """Return D(x) and the product, [B, 2C, H, W]."""
        x, along, evidence = self._parts(query)
        answer = self._denoiser.product_from(x, along, evidence, self._direction)
        return Denoised(np.concatenate([answer.mean, answer.product], axis=1), None)

    def _parts(
        self, query: Query
    ) -> tuple[Query, npt.NDArray[np.float32], npt.NDArray[np.float64]]:
        channels = 2 * self._denoiser.info.shape[0]
        x, along = _split(replace(query, pixels=query.pixels[:, :channels]))
        return x, along, _whole(query.pixels[:, channels:])


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


class OriginalityAsDenoiser:
    """Denoiser whose result is an ``Originality``: reports of the images of a query.

    The level is that of the explanation of each image. A query is one image, as for an explanation.
    An image without a label is explained by the finest scale of a model of pictures.

    Args:
        denoiser: denoiser with a bank; explains, unless the reports lack all measures of sources.
    """

    def __init__(self, denoiser: HasBank) -> None:
        self._denoiser = denoiser

    @property
    def info(self) -> DenoiserInfo:
        """Description of the denoiser."""
        return self._denoiser.info

    def check(self, query: Query) -> None:
        """Raise InvalidArgumentError if the denoiser rejects the images."""
        self._denoiser.check(query)

    def predict_seconds(self, query: Query) -> float:
        """Return the estimate of an explanation and of the distances."""
        seconds = len(query) * (REPORT_S + self._denoiser.bank.size * DISTANCE_S)
        if isinstance(self._denoiser, Explainable):
            seconds += self._denoiser.predict_explain_seconds(self._at_a_scale(query))
        return seconds

    def denoise(self, query: Query) -> Originality:
        """Return the reports."""
        bank, wraps = self._denoiser.bank, self.info.padding == "circular"
        if not isinstance(self._denoiser, Explainable):
            reports = [report(image, bank) for image in query.pixels]
            return Originality(query.pixels, None, reports, bank)
        # The images at the signal scale of their level, without noise.
        a = query.level.a.astype(np.float32)[:, None, None, None]
        noisy = query if (a == 1).all() else replace(query, pixels=a * query.pixels)
        found = self._denoiser.explain(self._at_a_scale(noisy), MAX_SOURCES)
        rows = zip(query.pixels, found.sources, found.weights, found.shares, strict=True)
        reports = [report(image, bank, *sources, wraps=wraps) for image, *sources in rows]
        return Originality(found.pixels, None, reports, bank)

    def _at_a_scale(self, query: Query) -> Query:
        scales = self.info.scales
        if not scales:
            return query
        # Coarser scales would compete with the pixels that an image may be copied from.
        return replace(query, labels=np.where(query.labels < 0, len(scales) - 1, query.labels))


def _split(query: Query) -> tuple[Query, npt.NDArray[np.float32]]:
    """Return the query of x, and the direction."""
    channels = query.pixels.shape[1] // 2
    pixels = np.ascontiguousarray(query.pixels[:, :channels])
    x = replace(query, pixels=pixels)
    return x, query.pixels[:, channels:]


def _halves(numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Return the bytes of float64 numbers [B, K, H, W] as float32 numbers [B, 2K, H, W]."""
    batch, count, height, width = numbers.shape
    halves = np.ascontiguousarray(numbers).view(np.float32)
    return halves.reshape(batch, 2 * count, height, width)


def _whole(halves: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return the float64 numbers [B, K, H, W] of ``_halves``."""
    batch, count, height, width = halves.shape
    contiguous = np.ascontiguousarray(halves).reshape(batch, count // 2, height, 2 * width)
    return contiguous.view(np.float64)
