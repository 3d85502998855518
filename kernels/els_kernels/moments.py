"""Second moments of the patch posterior: variance, entropy, sources, Jacobian products.

For a place with weights w over sources with patches φ and centres v, D = Σ w v, z = x/a, σ = s/a::

    variance  Σ w (v − D)²              (J u)      = 1/(aσ²) Σ w (v − D) ⟨φ, u⟩
    entropy  −Σ w log w                 (Jᵀ g)[q] += 1/(aσ²) Σ w ⟨g, v − D⟩ φ[q]

One pass over the bank finds D and log Σ exp(logit), a second one the moments, so that weights are
final when they are used and no pair is stored. Both passes are float64: a logit at s = 1e-4 is of
size 1e8, and a Jacobian divides by σ².
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from els_kernels import whole_moments
from els_kernels.attention import PatchAttention
from els_kernels.displacements import Pairs, Sweep, sweep_steps
from els_kernels.geometry import Geometry
from els_kernels.ranking import Ranking

MAX_SOURCES = 16
"""Most sources of a pixel that are reported."""
_CERTAIN = 1e-3
"""Remaining weight below which a removal is recomputed instead of subtracted."""


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
    """[B, N] float64: mean over the pixels of each bank image's weight; sums to one."""

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


class PatchMoments:
    """Moments of the posterior of a ``PatchAttention``, exact.

    Results are batch invariant for one number of torch's threads, as images are computed one by
    one. Work for a batch needs less than 64 MiB beside the bank.

    Args:
        attention: operator of the same bank; checks the queries.
        bank: [N, C, H, W] on the operator's device; float32, or uint8 v for v/127.5 − 1, which is
            decoded tile by tile.

    Raises:
        ValueError: The bank has another shape than the operator's, or another dtype.
    """

    def __init__(self, attention: PatchAttention, bank: Tensor) -> None:
        expected = (attention.images, *attention.shape)
        if tuple(bank.shape) != expected or bank.dtype not in (torch.uint8, torch.float32):
            raise ValueError(
                f"bank: expected uint8 or float32 {list(expected)}, "
                f"got {bank.dtype} {list(bank.shape)}"
            )
        self._attention, self._bank = attention, bank

    def vjp(
        self,
        x: Tensor,
        cotangent: Tensor,
        *,
        a: Tensor,
        s: Tensor,
        window: Tensor | None = None,
        ranges: Tensor | None = None,
        geometry: Geometry,
        evidence: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return D(x) and Jᵀg with J = ∂D/∂x, both [B, C, H, W] float32.

        Args:
            x: noisy images [B, C, H, W] float32, as of ``PatchAttention``.
            cotangent: g, [B, C, H, W] float32, finite.
            a: signal scale of each image [B].
            s: noise scale of each image [B].
            window: odd side of each image's patch [B]; None where ``geometry.whole``.
            ranges: half-open ranges of bank images, [B, 2]; None for all.
            geometry: window shape, sources and padding.
            evidence: of the same arguments, from ``evidence``: spares the first of two passes and
                changes no bit. That of others gives finite or infinite numbers without meaning.

        Raises:
            ValueError: An argument is invalid; names it, expected and got.
            ComputationStoppedError: The current ``Control`` was stopped.
        """
        with self._exact():
            queries = self._queries(x, a, s, window, ranges, geometry, evidence)
            directions = self._directions("cotangent", cotangent, x)
            return _stacked([q.vjp(g) for q, g in zip(queries, directions, strict=True)])

    def jvp(
        self,
        x: Tensor,
        tangent: Tensor,
        *,
        a: Tensor,
        s: Tensor,
        window: Tensor | None = None,
        ranges: Tensor | None = None,
        geometry: Geometry,
        evidence: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return D(x) and J u with J = ∂D/∂x, both [B, C, H, W] float32.

        Args:
            x: noisy images [B, C, H, W] float32, as of ``PatchAttention``.
            tangent: u, [B, C, H, W] float32, finite.
            a: signal scale of each image [B].
            s: noise scale of each image [B].
            window: odd side of each image's patch [B]; None where ``geometry.whole``.
            ranges: half-open ranges of bank images, [B, 2]; None for all.
            geometry: window shape, sources and padding.
            evidence: as of ``vjp``.

        Raises:
            ValueError, ComputationStoppedError: As ``vjp``.
        """
        with self._exact():
            queries = self._queries(x, a, s, window, ranges, geometry, evidence)
            directions = self._directions("tangent", tangent, x)
            return _stacked([q.jvp(u) for q, u in zip(queries, directions, strict=True)])

    @property
    def evidence_channels(self) -> int:
        """Number K of float64 numbers that ``evidence`` has for each pixel."""
        return self._bank.shape[1] + 1

    def evidence(
        self,
        x: Tensor,
        *,
        a: Tensor,
        s: Tensor,
        window: Tensor | None = None,
        ranges: Tensor | None = None,
        geometry: Geometry,
    ) -> Tensor:
        """Return what the first pass of ``vjp`` and ``jvp`` finds: [B, K, H, W] float64.

        Args:
            x: noisy images [B, C, H, W] float32, as of ``PatchAttention``.
            a: signal scale of each image [B].
            s: noise scale of each image [B].
            window: odd side of each image's patch [B]; None where ``geometry.whole``.
            ranges: half-open ranges of bank images, [B, 2]; None for all.
            geometry: window shape, sources and padding.

        Raises:
            ValueError, ComputationStoppedError: As ``vjp``.
        """
        with self._exact():
            queries = self._queries(x, a, s, window, ranges, geometry)
            found = [query.posterior(*query.limits) for query in queries]
            return torch.stack([torch.cat([mean, log_sum[None]]) for mean, log_sum in found])

    def statistics(
        self,
        x: Tensor,
        *,
        a: Tensor,
        s: Tensor,
        window: Tensor | None = None,
        ranges: Tensor | None = None,
        geometry: Geometry,
        top: int = 8,
    ) -> PosteriorStatistics:
        """Return the statistics of every pixel.

        Args:
            x: noisy images [B, C, H, W] float32, as of ``PatchAttention``.
            a: signal scale of each image [B].
            s: noise scale of each image [B].
            window: odd side of each image's patch [B]; None where ``geometry.whole``.
            ranges: half-open ranges of bank images, [B, 2]; None for all.
            geometry: window shape, sources and padding.
            top: number m of sources of a pixel, 1 to ``MAX_SOURCES``.

        Raises:
            ValueError, ComputationStoppedError: As ``vjp``.
        """
        if not 1 <= top <= MAX_SOURCES:
            raise ValueError(f"top: expected 1 to {MAX_SOURCES}, got {top}")
        with self._exact():
            queries = self._queries(x, a, s, window, ranges, geometry)
            parts = [query.statistics(top, len(self._bank)) for query in queries]
            return PosteriorStatistics(*map(torch.stack, zip(*parts, strict=True)))

    def without(
        self,
        x: Tensor,
        image: int,
        *,
        a: Tensor,
        s: Tensor,
        window: Tensor | None = None,
        ranges: Tensor | None = None,
        geometry: Geometry,
    ) -> Removal:
        """Return D(x) of the bank without one image: ``(D − w_i v_i) / (1 − w_i)``, exactly.

        Where 1 − w_i is small, the mean of the others is computed from themselves.

        Args:
            x: noisy images [B, C, H, W] float32, as of ``PatchAttention``.
            image: index in the bank; outside a query's range it changes nothing.
            a: signal scale of each image [B].
            s: noise scale of each image [B].
            window: odd side of each image's patch [B]; None where ``geometry.whole``.
            ranges: half-open ranges of bank images, [B, 2]; None for all.
            geometry: window shape, sources and padding.

        Raises:
            ValueError: As ``vjp``, or the image is the only one of a range.
            ComputationStoppedError: As ``vjp``.
        """
        if not 0 <= image < len(self._bank):
            raise ValueError(f"image: expected 0 to {len(self._bank) - 1}, got {image}")
        with self._exact():
            queries = self._queries(x, a, s, window, ranges, geometry)
            return Removal(*_stacked([query.without(image) for query in queries]))

    def steps(self, images: int, window: int, geometry: Geometry) -> int:
        """Return the number of steps of one pass over bank images: a fixed cost each.

        Args:
            images: of the bank, in the query's range.
            window: odd side of the patch; 1 where ``geometry.whole``.
            geometry: window shape, sources and padding.
        """
        if geometry.whole:
            return whole_moments.sweep_steps(images, self._attention.shape, geometry)
        return sweep_steps(images, self._attention.shape, window, geometry)

    @contextmanager
    def _exact(self) -> Iterator[None]:
        """Compute in float64 and without gradients, whatever the caller's modes."""
        with torch.no_grad(), torch.autocast(self._bank.device.type, enabled=False):
            yield

    def _queries(
        self,
        x: Tensor,
        a: Tensor,
        s: Tensor,
        window: Tensor | None,
        ranges: Tensor | None,
        geometry: Geometry,
        evidence: Tensor | None = None,
    ) -> list[_Query]:
        images, scales, noises, windows, limits, geometry = self._attention.validate(
            x, a=a, s=s, window=window, ranges=ranges, geometry=geometry
        )
        kind = _WholeQuery if geometry.whole else _PatchQuery
        queries: list[_Query] = [
            kind(images[b], scales[b], noises[b], self._bank, limits[b], windows[b], geometry)
            for b in range(len(images))
        ]
        if evidence is not None:
            self._check_evidence(evidence, x)
            for query, found in zip(queries, evidence, strict=True):
                query.known = found[:-1], found[-1]
        return queries

    def _check_evidence(self, evidence: Tensor, x: Tensor) -> None:
        expected = [len(x), self.evidence_channels, *x.shape[2:]]
        if list(evidence.shape) != expected or evidence.dtype != torch.float64:
            got = f"{evidence.dtype} {list(evidence.shape)}"
            raise ValueError(f"evidence: expected torch.float64 {expected}, got {got}")
        if not evidence.isfinite().all():
            raise ValueError("evidence: expected finite numbers, got others")

    def _directions(self, name: str, direction: Tensor, x: Tensor) -> Tensor:
        if not isinstance(direction, Tensor) or direction.shape != x.shape:
            got = list(direction.shape) if isinstance(direction, Tensor) else type(direction)
            raise ValueError(f"{name}: expected the shape of x, {list(x.shape)}, got {got}")
        if direction.dtype != torch.float32 or direction.device != x.device:
            raise ValueError(
                f"{name}: expected torch.float32 on {x.device}, "
                f"got {direction.dtype} on {direction.device}"
            )
        if not direction.isfinite().all():
            raise ValueError(f"{name}: expected finite numbers, got others")
        return direction.double()


class _Query(ABC):
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
        self.known: tuple[Tensor, Tensor] | None = None
        """``posterior`` of all images, if it was computed before."""

    def first_pass(self) -> tuple[Tensor, Tensor]:
        """Return the mean and log Σ exp(logit) of all images."""
        return self.known or self.posterior(*self.limits)

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
    def statistics(self, top: int, images: int) -> tuple[Tensor, ...]:
        """Return the fields of ``PosteriorStatistics`` for one image."""

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


class _PatchQuery(_Query):
    """Query of a machine with windows."""

    def _sweep(self, lo: int, hi: int) -> Sweep:
        return Sweep(self.image, self.sigma, self.bank[lo:hi], self.window, self.geometry)

    def posterior(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
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

    def statistics(self, top: int, images: int) -> tuple[Tensor, ...]:
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
            shares / (height * width),
        )


class _WholeQuery(_Query):
    """Query of a machine whose window is the whole image: one posterior for all pixels."""

    def _shifts(self, lo: int, hi: int) -> whole_moments.Shifts:
        return whole_moments.Shifts(self.image, self.sigma, self.bank[lo:hi], self.geometry)

    def posterior(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        mean, log_sum = self._shifts(lo, hi).posterior()
        return mean, log_sum.expand_as(mean[0])

    def vjp(self, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return D and Jᵀg = J g: J is a covariance over σ²a, so symmetric."""
        return self.jvp(cotangent)

    def jvp(self, tangent: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_sum = self.first_pass()
        covariance = self._shifts(*self.limits).covariance(tangent, mean, log_sum[0, 0])
        return mean, covariance * self.jacobian_scale

    def statistics(self, top: int, images: int) -> tuple[Tensor, ...]:
        return self._shifts(*self.limits).statistics(top, images, self.limits[0])


def _weights(pairs: Pairs, log_sum: Tensor) -> Tensor:
    """Return the final weights [R, S, T]; overwrites the logits."""
    return pairs.logits.sub_(pairs.at(log_sum)[..., None]).exp_()


def _stacked(answers: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    means, products = zip(*answers, strict=True)
    return torch.stack(means).float(), torch.stack(products).float()
