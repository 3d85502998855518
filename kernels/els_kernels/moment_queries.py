"""Posterior moments of one query image in torch, float64: windows by displacement, whole images.

One pass over the bank finds D and log Σ exp(logit), a second one the moments, so that weights are
final when they are used and no pair is stored. Passes answer for a range of the bank each: answers
of ranges are merged by ``blocked_moments``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from els_kernels import whole_moments
from els_kernels.displacements import Pairs, Sweep
from els_kernels.geometry import Geometry
from els_kernels.ranking import Ranking

Direction = Literal["vjp", "jvp"]
_TILE = 1 << 21
"""Numbers of bank images that are unpacked together: 16 MiB."""


class Spread(NamedTuple):
    """Moments about the mean of a whole bank, of a range of it: float64 unless stated."""

    second: Tensor
    """[C, H, W]: Σ w (v − D)²; of translations of whole images Σ w v²."""
    entropy: Tensor
    """[H, W]: −Σ w log w."""
    sources: Tensor
    """[H, W, m, 3] int64: image of the range, row, column, of falling weight; −1 where there are
    fewer."""
    weights: Tensor
    """[H, W, m]: of ``sources``."""
    shares: Tensor
    """[N]: mean over the pixels of the weight of each image of the range."""


class MomentQuery(ABC):
    """One query image and a range of bank images.

    Args:
        x: image [C, H, W].
        a: signal scale.
        s: noise scale.
        bank: the range, [N, C, H, W], float32 or uint8.
        window: odd side of the patch; 1 where ``geometry.whole``.
        geometry: window shape, sources and padding.
    """

    def __init__(
        self, x: Tensor, a: float, s: float, bank: Tensor, window: int, geometry: Geometry
    ) -> None:
        self.image, self.sigma = x.double() / a, s / a
        self.jacobian_scale = a / (s * s)
        self.bank, self.window, self.geometry = bank, window, geometry

    @abstractmethod
    def posterior(self) -> tuple[Tensor, Tensor]:
        """Return the mean [C, H, W] and log Σ exp(logit) [H, W] of the range, float64."""

    @abstractmethod
    def product(self, kind: Direction, direction: Tensor, mean: Tensor, log_sum: Tensor) -> Tensor:
        """Return the range's part of Jᵀg or J u, [C, H, W] float64.

        Args:
            kind: which product.
            direction: g or u, [C, H, W].
            mean: D, of the whole bank.
            log_sum: log Σ exp(logit), of the whole bank.
        """

    @abstractmethod
    def spread(self, top: int, mean: Tensor, log_sum: Tensor) -> Spread:
        """Return the moments of the range about the mean of the whole bank.

        Args:
            top: number of sources.
            mean: D, of the whole bank.
            log_sum: log Σ exp(logit), of the whole bank.
        """


class PatchQuery(MomentQuery):
    """Query of a machine with windows."""

    def _sweep(self) -> Sweep:
        return Sweep(self.image, self.sigma, self.bank, self.window, self.geometry)

    def posterior(self) -> tuple[Tensor, Tensor]:
        """Return the mean and log Σ exp(logit) of the range."""
        peak = torch.full_like(self.image[0], -math.inf)
        total, sums = torch.zeros_like(peak), torch.zeros_like(self.image)
        for pairs in self._sweep():
            here = pairs.at(peak)
            top = torch.maximum(here, pairs.logits.amax(-1))
            weights = pairs.logits.sub_(top[..., None]).exp_()
            scale = (here - top).exp_()
            pairs.at(total).mul_(scale).add_(weights.sum(-1))
            pairs.at(sums).mul_(scale).add_(torch.einsum("rst,crst->crs", weights, pairs.values))
            here.copy_(top)
        return sums / total, peak + total.log()

    def product(self, kind: Direction, direction: Tensor, mean: Tensor, log_sum: Tensor) -> Tensor:
        """Return the range's part of Jᵀg or J u."""
        found = self._vjp if kind == "vjp" else self._jvp
        return found(direction, mean, log_sum) * self.jacobian_scale

    def _vjp(self, cotangent: Tensor, mean: Tensor, log_sum: Tensor) -> Tensor:
        sweep = self._sweep()
        gradient = torch.zeros_like(sweep.padded(self.image))
        for pairs in sweep:
            weights = _weights(pairs, log_sum)
            gaps = pairs.values - pairs.at(mean)[..., None]
            weights *= (gaps * pairs.at(cotangent)[..., None]).sum(0)
            spread = pairs.spread(weights)
            pairs.facing(gradient).add_(torch.einsum("qpt,cqpt->cqp", spread, pairs.keys))
        return sweep.unpadded(gradient)

    def _jvp(self, tangent: Tensor, mean: Tensor, log_sum: Tensor) -> Tensor:
        sweep = self._sweep()
        direction = sweep.padded(tangent)
        answer = torch.zeros_like(self.image)
        for pairs in sweep:
            weights = _weights(pairs, log_sum)
            weights *= pairs.window_sums((pairs.keys * pairs.facing(direction)[..., None]).sum(0))
            gaps = pairs.values - pairs.at(mean)[..., None]
            pairs.at(answer).add_(torch.einsum("rst,crst->crs", weights, gaps))
        return answer

    def spread(self, top: int, mean: Tensor, log_sum: Tensor) -> Spread:
        """Return the moments of the range about the mean of the whole bank."""
        second, entropy = torch.zeros_like(mean), torch.zeros_like(log_sum)
        shares = mean.new_zeros(len(self.bank))
        height, width = log_sum.shape
        ranking = Ranking(top, height, width, mean.device)
        for pairs in self._sweep():
            surprise = pairs.at(log_sum)[..., None] - pairs.logits
            weights = surprise.neg().exp_()
            gaps = (pairs.values - pairs.at(mean)[..., None]).square_()
            pairs.at(second).add_(torch.einsum("rst,crst->crs", weights, gaps))
            pairs.at(entropy).add_((weights * surprise).sum(-1))
            shares[pairs.first : pairs.first + weights.shape[-1]] += weights.sum((0, 1))
            ranking.add(pairs, weights, pairs.first)
        return Spread(second, entropy, *ranking.result(), shares / (height * width))


class WholeQuery(MomentQuery):
    """Query of a machine whose window is the whole image: one posterior for all pixels."""

    def _shifts(self) -> whole_moments.Shifts:
        return whole_moments.Shifts(self.image, self.sigma, self.bank, self.geometry)

    def posterior(self) -> tuple[Tensor, Tensor]:
        """Return the mean and log Σ exp(logit) of the range."""
        mean, log_sum = self._shifts().posterior()
        return mean, log_sum.expand_as(mean[0])

    def product(self, kind: Direction, direction: Tensor, mean: Tensor, log_sum: Tensor) -> Tensor:
        """Return the range's part of Jᵀg = J g: J is a covariance over σ²a, so symmetric."""
        return self._shifts().covariance(direction, mean, log_sum[0, 0]) * self.jacobian_scale

    def spread(self, top: int, mean: Tensor, log_sum: Tensor) -> Spread:
        """Return the moments of the range about the mean of the whole bank."""
        return Spread(*self._shifts().statistics(top, mean, log_sum[0, 0]))


def merge_posteriors(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return mean [C, H, W] and log Σ exp(logit) [H, W] of several ranges, merged in order."""
    (mean, log_sum), *others = parts
    for part, part_sum in others:
        total = torch.logaddexp(log_sum, part_sum)
        mean = mean * (log_sum - total).exp() + part * (part_sum - total).exp()
        log_sum = total
    return mean, log_sum


def exact_posterior(
    images: Callable[[int, int], Tensor],
    x: Tensor,
    a: float,
    s: float,
    window: int,
    limits: tuple[int, int],
    geometry: Geometry,
) -> tuple[Tensor, Tensor]:
    """Return the mean [C, H, W] and log evidence [H, W] of one image [C, H, W], float64.

    Args:
        images: first and last + 1 → images of the bank, [n, C, H, W].
        x: image.
        a: signal scale.
        s: noise scale.
        window: odd side of the patch; 1 where ``geometry.whole``.
        limits: range of bank images.
        geometry: window shape, sources and padding.

    Raises:
        ComputationStoppedError: The current ``Control`` was stopped.
    """
    kind = WholeQuery if geometry.whole else PatchQuery
    together = max(1, _TILE // x.numel())
    parts = []
    for first in range(limits[0], limits[1], together):
        bank = images(first, min(first + together, limits[1]))
        parts.append(kind(x, a, s, bank, window, geometry).posterior())
    return merge_posteriors(parts)


def _weights(pairs: Pairs, log_sum: Tensor) -> Tensor:
    """Return the final weights [R, S, T]; overwrites the logits."""
    return pairs.logits.sub_(pairs.at(log_sum)[..., None]).exp_()
