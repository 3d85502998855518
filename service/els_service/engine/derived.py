"""Jacobian products and explanations as denoisers: queued, with a deadline and a watchdog.

Each computation has a queue and a cost model of its own. Images and their directions travel as one
query, which the scheduler splits, joins and halves like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from els_kernels import MAX_SOURCES
from els_service.denoisers.base import (
    AnswersInPart,
    Denoised,
    Denoiser,
    DenoiserInfo,
    Query,
)
from els_service.denoisers.explanations import Explainable
from els_service.denoisers.gradients import (
    Differentiable,
    Direction,
    Product,
    ReusesEvidence,
)
from els_service.denoisers.originality import HasBank, Originality, report

Computation = Literal[
    "vjp", "jvp", "explain", "variance", "evidence", "vjp_again", "jvp_again", "originality",
    "partial",
]  # fmt: skip
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
    match computation:
        case "explain" | "variance":
            if isinstance(denoiser, Explainable):
                return _explainer(denoiser) if computation == "explain" else _variance(denoiser)
        case "originality":
            if isinstance(denoiser, HasBank):
                return _originality(denoiser)
        case "partial":
            if isinstance(denoiser, AnswersInPart):
                return _partial(denoiser)
        case "evidence":
            if isinstance(denoiser, ReusesEvidence):
                return _evidence(denoiser)
        case "vjp_again" | "jvp_again":
            if isinstance(denoiser, ReusesEvidence):
                return _product_again(denoiser, "vjp" if computation == "vjp_again" else "jvp")
        case "vjp" | "jvp":
            if isinstance(denoiser, Differentiable):
                return _product(denoiser, computation)
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
    """Return the evidence in the answer of its computation, [B, K, H, W]."""
    return _whole(answer.pixels)


def product_of(answer: Denoised) -> Product:
    """Return the product in the answer to such a query."""
    channels = answer.pixels.shape[1] // 2
    return Product(answer.pixels[:, :channels], answer.pixels[:, channels:])


@dataclass(frozen=True)
class _Derived:
    """Denoiser whose result is that of another computation of a denoiser.

    Attributes:
        denoiser: describes itself, and checks x.
        seconds: query → predicted seconds of the computation.
        compute: query → its result.
        x: query → the images alone, of a query with more.
    """

    denoiser: Explainable | HasBank | Differentiable | AnswersInPart
    seconds: Callable[[Query], float]
    compute: Callable[[Query], Denoised]
    x: Callable[[Query], Query] = lambda query: query

    @property
    def info(self) -> DenoiserInfo:
        """Description of the denoiser."""
        return self.denoiser.info

    def check(self, query: Query) -> None:
        """Raise InvalidArgumentError if the denoiser rejects x."""
        self.denoiser.check(self.x(query))

    def predict_seconds(self, query: Query) -> float:
        """Return the estimate of the computation."""
        return self.seconds(query)

    def denoise(self, query: Query) -> Denoised:
        """Return the result of the computation."""
        return self.compute(query)


def _product(denoiser: Differentiable, direction: Direction) -> Denoiser:
    """Return the denoiser whose result for a ``with_direction`` is D(x) before the product."""
    multiply = denoiser.vjp if direction == "vjp" else denoiser.jvp
    return _Derived(
        denoiser,
        lambda query: denoiser.predict_product_seconds(_split(query)[0], direction),
        lambda query: _joined(multiply(*_split(query))),
        lambda query: _split(query)[0],
    )


def _partial(denoiser: AnswersInPart) -> Denoiser:
    """Return the denoiser whose result is D(x), log evidence and share, [B, C + 2, H, W]."""

    def answer(query: Query) -> Denoised:
        found, shares = denoiser.denoise_partial(query)
        assert found.log_evidence is not None
        share = np.array(shares, np.float32)[:, None, None]
        beside = np.stack([found.log_evidence, np.broadcast_to(share, found.log_evidence.shape)], 1)
        return Denoised(np.concatenate([found.pixels, beside], axis=1), None)

    return _Derived(denoiser, denoiser.predict_seconds, answer)


def partial_of(answer: Denoised) -> tuple[Denoised, list[float]]:
    """Return the answer to such a query, and the share of each image."""
    pixels = answer.pixels
    shares = [float(share) for share in pixels[:, -1, 0, 0]]
    images = np.ascontiguousarray(pixels[:, :-2])
    return Denoised(images, np.ascontiguousarray(pixels[:, -2])), shares


def _evidence(denoiser: ReusesEvidence) -> Denoiser:
    """Return the denoiser whose result is the evidence of x, as halves [B, 2K, H, W]."""
    return _Derived(
        denoiser,
        denoiser.predict_evidence_seconds,
        lambda query: Denoised(_halves(denoiser.evidence(query)), None),
    )


def _product_again(denoiser: ReusesEvidence, direction: Direction) -> Denoiser:
    """Return the denoiser whose result for a ``with_evidence`` is that of ``_product``."""
    channels = 2 * denoiser.info.shape[0]

    def split(query: Query) -> tuple[Query, npt.NDArray[np.float32]]:
        return _split(replace(query, pixels=query.pixels[:, :channels]))

    def multiply(query: Query) -> Denoised:
        evidence = _whole(query.pixels[:, channels:])
        return _joined(denoiser.product_from(*split(query), evidence, direction))

    return _Derived(
        denoiser,
        lambda query: denoiser.predict_evidence_seconds(split(query)[0]),
        multiply,
        lambda query: split(query)[0],
    )


def _explainer(denoiser: Explainable) -> Denoiser:
    """Return the denoiser whose result is an ``Explanation``, of ``MAX_SOURCES`` for each pixel.

    A query is one image, so that it is never split; others may join it in a batch.
    """
    return _Derived(
        denoiser,
        denoiser.predict_explain_seconds,
        lambda query: denoiser.explain(query, MAX_SOURCES),
    )


def _variance(denoiser: Explainable) -> Denoiser:
    """Return the denoiser whose result is the posterior variance, [B, C, H, W].

    Its estimate is that of an explanation, which takes as long.
    """
    return _Derived(
        denoiser,
        denoiser.predict_explain_seconds,
        lambda query: Denoised(denoiser.variance(query), None),
    )


def _originality(denoiser: HasBank) -> Denoiser:
    """Return the denoiser whose result is an ``Originality``: reports of the images of a query.

    The level is that of the explanation of each image; a denoiser without explanations has reports
    without measures of sources. A query is one image, as for an explanation. An image without a
    label is explained by the finest scale of a model of pictures.
    """
    scales, wraps = denoiser.info.scales, denoiser.info.padding == "circular"

    def at_a_scale(query: Query) -> Query:
        if not scales:
            return query
        # Coarser scales would compete with the pixels that an image may be copied from.
        return replace(query, labels=np.where(query.labels < 0, len(scales) - 1, query.labels))

    def seconds(query: Query) -> float:
        distances = len(query) * (REPORT_S + denoiser.bank.size * DISTANCE_S)
        if not isinstance(denoiser, Explainable):
            return distances
        return distances + denoiser.predict_explain_seconds(at_a_scale(query))

    def compare(query: Query) -> Originality:
        bank = denoiser.bank
        if not isinstance(denoiser, Explainable):
            return Originality(query.pixels, None, [report(x, bank) for x in query.pixels], bank)
        # The images at the signal scale of their level, without noise.
        a = query.level.a.astype(np.float32)[:, None, None, None]
        noisy = query if (a == 1).all() else replace(query, pixels=a * query.pixels)
        found = denoiser.explain(at_a_scale(noisy), MAX_SOURCES)
        rows = zip(query.pixels, found.sources, found.weights, found.shares, strict=True)
        reports = [report(x, bank, *sources, wraps=wraps) for x, *sources in rows]
        return Originality(found.pixels, None, reports, bank)

    return _Derived(denoiser, seconds, compare)


def _joined(answer: Product) -> Denoised:
    """Return D(x) before the product, [B, 2C, H, W]."""
    return Denoised(np.concatenate([answer.mean, answer.product], axis=1), None)


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
