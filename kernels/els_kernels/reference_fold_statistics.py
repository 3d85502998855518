"""Posterior moments of a fold by their definitions, in float64: the specification of fold moments.

Every weight of every patch, and of every pixel, is held at once, and Jacobian products are
automatic differentiation of the reference's own softmax and fold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from els_kernels.geometry import Geometry
from els_kernels.reference_fold import (
    _fold,
    _log_weight,
    _logits,
    _offsets,
    _patches,
    _query_centres,
    _sources,
)


@dataclass(frozen=True, eq=False)
class ReferenceFoldPosterior:
    """The whole posterior of one query image.

    Args:
        x: [C, H, W].
        bank: images [C, h, w] that are attended to.
        a: signal scale.
        s: noise scale.
        window: odd.
        fold: ρ, above 0.
        geometry: sources and padding.
    """

    x: Tensor
    bank: Sequence[Tensor]
    a: float
    s: float
    window: int
    fold: float
    geometry: Geometry

    def mean(self, x: Tensor | None = None) -> Tensor:
        """Return D, [C, H, W] float64, differentiable in x."""
        logits, keys = self._logits(self.x.double() if x is None else x)
        means = torch.einsum("qj,jco->qco", logits.softmax(1), keys)
        size = self.x.shape[1], self.x.shape[2]
        return _fold(means, self._centres(), size, self.window, self.fold, self.geometry)

    def vjp(self, cotangent: Tensor) -> Tensor:
        """Return Jᵀg by reverse-mode differentiation, [C, H, W] float64."""
        with torch.enable_grad():
            point = self.x.double().requires_grad_()
            (gradient,) = torch.autograd.grad(self.mean(point), point, cotangent.double())
        return gradient

    def jvp(self, tangent: Tensor) -> Tensor:
        """Return J u by differentiating g ↦ Jᵀg, [C, H, W] float64."""
        with torch.enable_grad():
            point = self.x.double().requires_grad_()
            dual = torch.zeros_like(point, requires_grad=True)
            (pulled,) = torch.autograd.grad(self.mean(point), point, dual, create_graph=True)
            (product,) = torch.autograd.grad(pulled, dual, tangent.double())
        return product

    def weights(self) -> list[Tensor]:
        """Return π of every pixel by every pixel of each image of the bank, [HW, hw] each.

        Each patch of the query spreads its weights over the pixels that it reaches, offset by
        offset.
        """
        _, height, width = self.x.shape
        centres, every = self._centres(), self._logits(self.x.double())[0].softmax(1)
        factors = self._factors(centres)
        found, start = [], 0
        for image in self.bank:
            h, w = image.shape[1:]
            places = _sources(h, w, self.window, self.geometry)
            own = every[:, start : start + len(places)]
            start += len(places)
            total = torch.zeros(height * width, h * w, dtype=torch.float64)
            for index, offset in enumerate(_offsets(self.window)):
                row, col = (places + offset).unbind(1)
                kept = (row >= 0) & (row < h) & (col >= 0) & (col < w)
                if self.geometry.padding == "circular":
                    row, col, kept = row % h, col % w, torch.ones_like(kept)
                pixels = (row * w + col)[kept]
                spread = torch.zeros(len(centres), h * w, dtype=torch.float64)
                spread.index_add_(1, pixels, own[:, kept])
                total += factors[index] @ spread
            found.append(total)
        return found

    def _factors(self, centres: Tensor) -> list[Tensor]:
        """Return g(p-q)/Σ g(p-·) of every offset, [HW, Q]."""
        _, height, width = self.x.shape
        logs = []
        for offset in _offsets(self.window):
            row, col = (centres + offset).unbind(1)
            inside = (row >= 0) & (row < height) & (col >= 0) & (col < width)
            if self.geometry.padding in ("circular", "valid"):
                row, col, inside = row % height, col % width, torch.ones_like(inside)
            log = torch.full((height * width, len(centres)), -torch.inf, dtype=torch.float64)
            patches = torch.arange(len(centres))[inside]
            log[(row * width + col)[inside], patches] = _log_weight(offset, self.window, self.fold)
            logs.append(log)
        joined = torch.stack(logs)
        largest = joined.amax((0, 2), keepdim=True)
        factors = (joined - largest).exp()
        return list(factors / factors.sum((0, 2), keepdim=True))

    def variance(self) -> Tensor:
        """Return Σ π (v − D)², [C, H, W]."""
        mean, total = self.mean().flatten(1), torch.zeros_like(self.x).double().flatten(1)
        for image, weights in zip(self.bank, self.weights(), strict=True):
            gaps = image.double().flatten(1)[:, None] - mean[:, :, None]
            total += (weights * gaps.square()).sum(2)
        return total.view_as(self.x)

    def entropy(self) -> Tensor:
        """Return −Σ π log π, [H, W], in nats."""
        terms = [torch.special.entr(weights).sum(1) for weights in self.weights()]
        return torch.stack(terms).sum(0).view(self.x.shape[1:])

    def shares(self) -> Tensor:
        """Return the mean weight of each image over the pixels, [N]."""
        return torch.stack([weights.sum(1).mean() for weights in self.weights()])

    def _centres(self) -> Tensor:
        _, height, width = self.x.shape
        return _query_centres(height, width, self.window, self.geometry)

    def _logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        centres = self._centres()
        queries = _patches(x, centres, self.window, self.geometry.padding != "zeros")
        level = self.a, self.s, self.window
        images = [image.double() for image in self.bank]
        return _logits(queries, centres, x, images, level, self.geometry)
