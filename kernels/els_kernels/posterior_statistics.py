"""Answers of the moments of a posterior: statistics of every pixel, and a bank without an image."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

MAX_SOURCES = 16
"""Most sources of a pixel that are reported."""


class PosteriorStatistics(NamedTuple):
    """Statistics of the posterior of every pixel, on the query's device; float32 unless stated."""

    mean: Tensor
    """[B, C, H, W]: D(x)."""
    variance: Tensor
    """[B, C, H, W]: Σ w (v − D)²; the own-pixel Jacobian is a/s² times it."""
    entropy: Tensor
    """[B, H, W]: −Σ w log w, in nats; its exponential is the effective number of sources."""
    sources: Tensor
    """[B, H, W, m, 3] int64: bank image, row, column, of falling weight; −1 where a pixel has fewer
    sources. Equal weights are in the order of the sweep, which depends on nothing but sizes."""
    weights: Tensor
    """[B, H, W, m]: of ``sources``, falling; the first is the largest of all. 0 where there is
    none."""
    shares: Tensor
    """[B, N] float64: mean over the pixels of each bank image's weight; sums to one. [B, 0] if they
    were not requested."""

    @property
    def effective_sources(self) -> Tensor:
        """Exp of the entropy, [B, H, W]: 1 where one source decides."""
        return self.entropy.exp()

    @property
    def largest_weight(self) -> Tensor:
        """The weight of the first source, [B, H, W]."""
        return self.weights[..., 0]


class Removal(NamedTuple):
    """Posterior without one bank image: float32."""

    mean: Tensor
    """[B, C, H, W]: D(x) of the bank without the image."""
    weight: Tensor
    """[B, H, W]: what the image weighed at each pixel."""
