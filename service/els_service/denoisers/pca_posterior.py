"""The posterior of one image under PCA-locality, and products with its Jacobian."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from els_kernels import checkpoint
from els_service.denoisers.pca_tiles import TiledMask

_BLOCK = 512
"""Images whose logits are computed at once; they fit the cache of a core."""
_LEAST_LOGIT = -60.0
"""Smallest logit below the largest, exp(-60) = 9e-27 of its weight: smaller ones become denormal
numbers, whose arithmetic is many times slower, and no bank has images enough for them to count."""


@dataclass(frozen=True, eq=False)
class Answer:
    """Result of a pass over the bank, by coordinate [D] float64."""

    mean: Tensor
    evidence: Tensor
    deviation: Tensor
    """D(x) - centre."""
    highest: Tensor
    """Largest logit, [D] float32."""
    total: Tensor
    """Σ exp(logit - highest)."""


@dataclass(frozen=True, eq=False)
class Posterior:
    """The posterior of one image.

    Logits are those of the formula up to -Σ_n M[n, m] y[n]² / (2σ²), which all images share, with
    y = z - c about the centre c: (z - v)² = y² + d (d - 2y) with d = v - c.

    Attributes:
        images: d of each image, [N, D] float32.
        centre: c, [D] float32.
        mask: M.
        y: [D] float64.
        sigma: σ.
    """

    images: Tensor
    centre: Tensor
    mask: TiledMask
    y: Tensor
    sigma: float

    def posterior(self) -> Answer:
        """Return mean and evidence."""
        size = self.images.shape[1]
        highest = self.images.new_full((size,), -math.inf)
        total = self.y.new_zeros(size)
        weighted = self.y.new_zeros(size)
        for block, logits in self._logits():
            higher = torch.maximum(highest, logits.amax(0))
            kept = (highest - higher).double().exp()
            weights = _exp(logits.sub_(higher))
            total = total * kept + weights.sum(0).double()
            weighted = weighted * kept + weights.mul_(block).sum(0).double()
            highest = higher
        deviation = weighted / total
        common = self.mask.sums(self.y.square()) / (2 * self.sigma**2)
        evidence = total.log() + highest - common
        return Answer(self.centre + deviation, evidence, deviation, highest, total)

    def vjp(self, answer: Answer, cotangent: Tensor) -> Tensor:
        """Return (∂D/∂z)ᵀ g = (1/σ²) Σ_v v ⊙ M (g ⊙ w_v ⊙ (v - D)), [D] float64."""
        product = self.y.new_zeros(len(self.y))
        scale = (cotangent.double() / answer.total).float()
        for block, weights in self._deviations(answer):
            product += self.mask.transposed_sums(weights.mul_(scale)).mul_(block).sum(0).double()
        return product / self.sigma**2

    def jvp(self, answer: Answer, tangent: Tensor) -> Tensor:
        """Return ∂D/∂z u = (1/σ²) Σ_v w_v ⊙ (v - D) ⊙ Mᵀ(v ⊙ u), [D] float64."""
        product = self.y.new_zeros(len(self.y))
        for block, weights in self._deviations(answer):
            product += self.mask.sums(block * tangent).mul_(weights).sum(0).double()
        return product / answer.total / self.sigma**2

    def _logits(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield d and logits of blocks of images, [n, D] each."""
        twice = (2 * self.y).float()
        factor = -0.5 / self.sigma**2
        for first in range(0, len(self.images), _BLOCK):
            checkpoint()
            block = self.images[first : first + _BLOCK]
            yield block, self.mask.sums((block - twice).mul_(block)).mul_(factor)

    def _deviations(self, answer: Answer) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield d and unnormalised w_v (v - D) of blocks of images, [n, D] each."""
        deviation = answer.deviation.float()
        for block, logits in self._logits():
            yield block, _exp(logits.sub_(answer.highest)).mul_(block - deviation)


def _exp(logits: Tensor) -> Tensor:
    """Return exp of logits ≤ 0, in place."""
    return logits.clamp_(min=_LEAST_LOGIT).exp_()
