"""Posterior moments of one query image in torch, float64: windows by displacement, whole images.

One pass over the bank finds D and log Σ exp(logit), a second one the moments, so that weights are
final when they are used and no pair is stored.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from els_kernels import whole_moments
from els_kernels.displacements import Pairs, Sweep
from els_kernels.geometry import Geometry
from els_kernels.ranking import Ranking

_CERTAIN = 1e-3
"""Remaining weight below which a removal is recomputed instead of subtracted."""


class MomentQuery(ABC):
    """One query image; ``posterior`` is the first pass, the other methods need it and a second."""

    def __init__(
        self,
        x: Tensor,
        a: float,
        s: float,
        bank: Tensor,
        limits: tuple[int, int],
        window: int,
        geometry: Geometry,
    ) -> None:
        self.image, self.sigma = x.double() / a, s / a
        self.jacobian_scale = a / (s * s)
        self.bank, self.limits = bank, limits
        self.window, self.geometry = window, geometry
        self.known: Tensor | None = None
        """``evidence``, if it was computed before."""

    def evidence(self) -> Tensor:
        """Return the first pass, [C + 1, H, W] float64: mean and log Σ exp(logit)."""
        mean, log_sum = self.posterior(*self.limits)
        return torch.cat([mean, log_sum[None]])

    def first_pass(self) -> tuple[Tensor, Tensor]:
        """Return the mean and log Σ exp(logit) of all images."""
        if self.known is None:
            return self.posterior(*self.limits)
        return self.known[:-1], self.known[-1]

    @abstractmethod
    def posterior(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """Return the mean [C, H, W] and log Σ exp(logit) [H, W] of a range of images, float64."""

    @abstractmethod
    def vjp(self, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and Jᵀg, [C, H, W] float64."""

    @abstractmethod
    def jvp(self, tangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and J u, [C, H, W] float64."""

    @abstractmethod
    def statistics(self, top: int, images: int, with_shares: bool) -> tuple[Tensor, ...]:
        """Return the fields of ``PosteriorStatistics`` for one image.

        Args:
            top: number of sources.
            images: of the whole bank.
            with_shares: whether shares are returned; [0] otherwise.
        """

    def without(self, image: int) -> tuple[Tensor, Tensor]:
        """Return the mean without an image and its weight, float64."""
        lo, hi = self.limits
        mean, log_sum = self.posterior(lo, hi)
        if not lo <= image < hi:
            return mean, torch.zeros_like(log_sum)
        if hi - lo == 1:
            raise ValueError("ranges: expected two images or more, one of which stays, got 1")
        own_mean, own_log_sum = self.posterior(image, image + 1)
        weight = (own_log_sum - log_sum).exp().clamp(max=1)
        rest = 1 - weight
        removed = (mean - weight * own_mean) / rest
        if (rest < _CERTAIN).any():
            others = self._merged([(lo, image), (image + 1, hi)])
            removed = torch.where(rest < _CERTAIN, others, removed)
        return removed, weight

    def _merged(self, parts: list[tuple[int, int]]) -> Tensor:
        """Return the mean of the images of several ranges."""
        found = [self.posterior(lo, hi) for lo, hi in parts if lo < hi]
        log_sums = torch.stack([log_sum for _, log_sum in found])
        shares = (log_sums - log_sums.logsumexp(0)).exp()
        return torch.stack([mean for mean, _ in found]).mul_(shares[:, None]).sum(0)


class PatchQuery(MomentQuery):
    """Query of a machine with windows."""

    def _sweep(self, lo: int, hi: int) -> Sweep:
        return Sweep(self.image, self.sigma, self.bank[lo:hi], self.window, self.geometry)

    def posterior(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """Return the mean and log Σ exp(logit) of a range of images."""
        peak = torch.full_like(self.image[0], -math.inf)
        total, sums = torch.zeros_like(peak), torch.zeros_like(self.image)
        for pairs in self._sweep(lo, hi):
            here = pairs.at(peak)
            top = torch.maximum(here, pairs.logits.amax(-1))
            weights = pairs.logits.sub_(top[..., None]).exp_()
            scale = (here - top).exp_()
            pairs.at(total).mul_(scale).add_(weights.sum(-1))
            pairs.at(sums).mul_(scale).add_(torch.einsum("rst,crst->crs", weights, pairs.values))
            here.copy_(top)
        return sums / total, peak + total.log()

    def vjp(self, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return D and Jᵀg."""
        mean, log_sum = self.first_pass()
        sweep = self._sweep(*self.limits)
        gradient = torch.zeros_like(sweep.padded(self.image))
        for pairs in sweep:
            weights = _weights(pairs, log_sum)
            gaps = pairs.values - pairs.at(mean)[..., None]
            weights *= (gaps * pairs.at(cotangent)[..., None]).sum(0)
            spread = pairs.spread(weights)
            pairs.facing(gradient).add_(torch.einsum("qpt,cqpt->cqp", spread, pairs.keys))
        return mean, sweep.unpadded(gradient) * self.jacobian_scale

    def jvp(self, tangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return D and J u."""
        mean, log_sum = self.first_pass()
        sweep = self._sweep(*self.limits)
        direction = sweep.padded(tangent)
        answer = torch.zeros_like(self.image)
        for pairs in sweep:
            weights = _weights(pairs, log_sum)
            weights *= pairs.window_sums((pairs.keys * pairs.facing(direction)[..., None]).sum(0))
            gaps = pairs.values - pairs.at(mean)[..., None]
            pairs.at(answer).add_(torch.einsum("rst,crst->crs", weights, gaps))
        return mean, answer * self.jacobian_scale

    def statistics(self, top: int, images: int, with_shares: bool) -> tuple[Tensor, ...]:
        """Return the fields of ``PosteriorStatistics`` for one image."""
        lo, hi = self.limits
        mean, log_sum = self.posterior(lo, hi)
        variance, entropy = torch.zeros_like(mean), torch.zeros_like(log_sum)
        shares = mean.new_zeros(images)
        height, width = log_sum.shape
        ranking = Ranking(top, height, width, mean.device)
        for pairs in self._sweep(lo, hi):
            surprise = pairs.at(log_sum)[..., None] - pairs.logits
            weights = surprise.neg().exp_()
            gaps = (pairs.values - pairs.at(mean)[..., None]).square_()
            pairs.at(variance).add_(torch.einsum("rst,crst->crs", weights, gaps))
            pairs.at(entropy).add_((weights * surprise).sum(-1))
            first = lo + pairs.first
            shares[first : first + weights.shape[-1]] += weights.sum((0, 1))
            ranking.add(pairs, weights, first)
        sources, largest = ranking.result()
        entropy.clamp_(min=0)
        return (
            mean.float(),
            variance.float(),
            entropy.float(),
            sources,
            largest.float(),
            (shares / (height * width))[: images if with_shares else 0],
        )


class FarQuery(PatchQuery):
    """Query that native logits do not resolve; its evidence has the shape of native evidence."""

    def evidence(self) -> Tensor:
        """Return the first pass, [C + 2, H, W] float64: mean, log Σ exp(logit) and zeros."""
        known = super().evidence()
        return torch.cat([known, torch.zeros_like(known[:1])])

    def first_pass(self) -> tuple[Tensor, Tensor]:
        """Return the mean and log Σ exp(logit) of all images."""
        if self.known is None:
            return self.posterior(*self.limits)
        return self.known[:-2], self.known[-2]


class WholeQuery(MomentQuery):
    """Query of a machine whose window is the whole image: one posterior for all pixels."""

    def _shifts(self, lo: int, hi: int) -> whole_moments.Shifts:
        return whole_moments.Shifts(self.image, self.sigma, self.bank[lo:hi], self.geometry)

    def posterior(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """Return the mean and log Σ exp(logit) of a range of images."""
        mean, log_sum = self._shifts(lo, hi).posterior()
        return mean, log_sum.expand_as(mean[0])

    def vjp(self, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return D and Jᵀg = J g: J is a covariance over σ²a, so symmetric."""
        return self.jvp(cotangent)

    def jvp(self, tangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return D and J u."""
        mean, log_sum = self.first_pass()
        covariance = self._shifts(*self.limits).covariance(tangent, mean, log_sum[0, 0])
        return mean, covariance * self.jacobian_scale

    def statistics(self, top: int, images: int, with_shares: bool) -> tuple[Tensor, ...]:
        """Return the fields of ``PosteriorStatistics`` for one image."""
        *most, shares = self._shifts(*self.limits).statistics(top, images, self.limits[0])
        return *most, shares[: images if with_shares else 0]


def _weights(pairs: Pairs, log_sum: Tensor) -> Tensor:
    """Return the final weights [R, S, T]; overwrites the logits."""
    return pairs.logits.sub_(pairs.at(log_sum)[..., None]).exp_()
