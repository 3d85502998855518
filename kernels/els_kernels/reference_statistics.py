"""Posterior moments by their definitions, in float64: the specification of ``moments``.

Every weight of every pixel is held at once, and Jacobian products are automatic differentiation of
the reference's own softmax, so nothing here shares a formula with the sweep.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from els_kernels.geometry import Geometry
from els_kernels.reference import _attend, _offsets, _patches, _sources


@dataclass(frozen=True, eq=False)
class ReferencePosterior:
    """The whole posterior of one query image.

    Args:
        x: [C, H, W].
        bank: [N, C, H, W]; the images attended to.
        a: signal scale.
        s: noise scale.
        window: odd; 1 where ``geometry.whole``.
        geometry: window shape, sources and padding.
    """

    x: Tensor
    bank: Tensor
    a: float
    s: float
    window: int
    geometry: Geometry

    def mean(self, x: Tensor | None = None) -> Tensor:
        """Return D, [C, H, W] float64, differentiable in x."""
        point = self.x if x is None else x
        return _attend(
            point.double(), self.bank.double(), self.a, self.s, self.window, self.geometry
        )[0]

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

    def log_weights(self) -> Tensor:
        """Return log w of every pixel, image and place, [HW, N, HW]; −∞ outside S(u)."""
        _, height, width = self.x.shape
        offsets = _offsets(height, width, self.window, self.geometry)
        wraps = self.geometry.padding != "zeros"
        queries = _patches(self.x.double()[None], offsets, wraps)[0]
        keys = _patches(self.bank.double(), offsets, wraps)
        allowed = _sources(height, width, self.window, self.geometry, self.x.device)
        gaps = queries[:, None, None] - self.a * keys
        logits = -gaps.square().sum(-1) / (2 * self.s * self.s)
        logits = logits.masked_fill(~allowed[:, None], -torch.inf)
        return logits.flatten(1).log_softmax(1).view_as(logits)

    def variance(self) -> Tensor:
        """Return Σ w (v − D)², [C, H, W]."""
        weights = self.log_weights().exp()
        values = self.bank.double().flatten(2)
        gaps = values[None] - self.mean().flatten(1).T[:, None, :, None]
        return torch.einsum("uny,uncy->cu", weights, gaps.square()).view_as(self.x)

    def entropy(self) -> Tensor:
        """Return −Σ w log w, [H, W]."""
        log_weights = self.log_weights()
        terms = log_weights.exp() * log_weights.clamp(min=-1e300)
        return -terms.flatten(1).sum(1).view(self.x.shape[1:])

    def shares(self) -> Tensor:
        """Return the mean weight of each image over the pixels, [N]."""
        return self.log_weights().exp().sum(2).mean(0)
