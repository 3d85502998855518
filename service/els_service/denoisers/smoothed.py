"""Smoothed closed-form diffusion models: the ideal machine, averaged over perturbed images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from els_service.denoisers.analytic import AnalyticDenoiser
from els_service.denoisers.base import Denoised, DenoiserInfo, Query
from els_service.denoisers.gradients import Direction, Product
from els_service.denoisers.mapped_banks import MappedBank
from els_service.denoisers.noise import standard_normal
from els_service.denoisers.source_banks import SourceBank

MAX_DRAWS = 1024
"""Largest number M of perturbations."""


class SmoothedDenoiser:
    """The ideal machine with a smoothed score: D(x) = (1/M) Σ_m D_ideal(x + a η (1 + σ) ε_m).

    Scarvelis, Haitz Sáez de Ocáriz Borde & Solomon, "Closed-form diffusion models", TMLR 2025
    (σ-CFDM; their σ is η here). The paper's: with z = t·x0 + (1 - t)·noise and
    k(z) = Σ_v softmax_v(-‖z - t·v‖² / (2 (1 - t)²)) t·v, the score of the bank is
    (k(z) - z) / (1 - t)², and the smoothed one has (1/M) Σ_m k(z + η ε_m) in place of k(z), with
    ε_m ~ N(0, I), M of them. The mean of η ε_m itself, which is 0 in expectation, is left out.

    Ours: x and σ = s/a in place of z and t, with t = 1/(1 + σ) and z = t·x/a, which makes η in z
    η (1 + σ) in x/a; ε_m that are drawn once from (seed, m), so that answers depend on the image
    alone; and the exact sum over the bank, where the paper has an estimator from the nearest images
    and random ones among the rest, and begins its trajectories at a t above 0. ``log_evidence`` is
    the mean of those of the perturbed images, whose gradient is the smoothed score up to the mean
    of ε_m.

    Args:
        ideal: the machine ``ideal``.
        smoothing: η ≥ 0.
        draws: M, 1 to ``MAX_DRAWS``.
        seed: seed of the perturbations, 0 to 2⁶⁴ - 1.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self, ideal: AnalyticDenoiser, *, smoothing: float, draws: int, seed: int = 0
    ) -> None:
        if ideal.info.machine != "ideal":
            raise ValueError(f"machine: expected ideal, got {ideal.info.machine}")
        if not 0 <= smoothing < float("inf"):
            raise ValueError(f"smoothing: expected 0 or more, finite, got {smoothing}")
        if not 1 <= draws <= MAX_DRAWS:
            raise ValueError(f"draws: expected 1 to {MAX_DRAWS}, got {draws}")
        self._ideal, self.smoothing, self.draws, self.seed = ideal, smoothing, draws, seed
        shape = ideal.info.shape
        size = int(np.prod(shape))
        self._noise = np.stack([standard_normal(seed, m, 0, size) for m in range(draws)])
        self._noise = self._noise.reshape(draws, *shape)
        self._info = replace(
            ideal.info,
            kind="smoothed",
            machine="",
            padding="",
            reuses_evidence=False,
            has_sources=False,
            memory_bytes=ideal.info.memory_bytes + self._noise.nbytes,
        )

    @property
    def info(self) -> DenoiserInfo:
        """Description of the denoiser."""
        return self._info

    @property
    def bank(self) -> SourceBank | MappedBank:
        """Images of the machine."""
        return self._ideal.bank

    def check(self, query: Query) -> None:
        """Raise InvalidArgumentError if the shape or a label is wrong, or a window is given."""
        self._ideal.check(query)

    def predict_seconds(self, query: Query) -> float:
        """Return M times the estimate of the ideal machine."""
        return self.draws * self._ideal.predict_seconds(query)

    def predict_product_seconds(self, query: Query, direction: Direction) -> float:
        """Return M times the estimate of the ideal machine."""
        return self.draws * self._ideal.predict_product_seconds(query, direction)

    def denoise(self, query: Query) -> Denoised:
        """Return posterior means and log evidences."""
        answers = [self._ideal.denoise(self._perturbed(query, i)) for i in range(len(query))]
        evidence = [answer.log_evidence for answer in answers if answer.log_evidence is not None]
        return Denoised(_means([answer.pixels for answer in answers]), _means(evidence))

    def vjp(self, query: Query, cotangent: npt.NDArray[np.float32]) -> Product:
        """Return D(x) and Jᵀg, the mean of those of the perturbed images."""
        return self._product(query, cotangent, "vjp")

    def jvp(self, query: Query, tangent: npt.NDArray[np.float32]) -> Product:
        """Return D(x) and J u, the mean of those of the perturbed images."""
        return self._product(query, tangent, "jvp")

    def _product(self, query: Query, along: npt.NDArray[np.float32], kind: Direction) -> Product:
        multiply = self._ideal.vjp if kind == "vjp" else self._ideal.jvp
        parts = [
            multiply(self._perturbed(query, i), np.repeat(along[i : i + 1], self.draws, axis=0))
            for i in range(len(query))
        ]
        return Product(_means([p.mean for p in parts]), _means([p.product for p in parts]))

    def _perturbed(self, query: Query, i: int) -> Query:
        """Return the M perturbed copies of image i."""
        scale = query.level.a[i] * self.smoothing * (1 + query.level.sigma[i])
        return Query(
            query.pixels[i] + np.float32(scale) * self._noise,
            query.level[i : i + 1].repeat(self.draws),
            np.repeat(query.labels[i : i + 1], self.draws),
            np.repeat(query.windows[i : i + 1], self.draws),
        )


def _means(of_images: list[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
    """Return the mean over the first axis of each array, [B, …], summed in float64."""
    return np.stack([values.mean(0, dtype=np.float64) for values in of_images]).astype(np.float32)
