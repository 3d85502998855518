"""ctypes binding of posterior moments: units and normalisers here, sweeps in C++.

Logits are integers in units of 2^-bits of a bit, as many as keep the difference of any two
logits of a patch below 2^31: sums over a window are exact, and equal patches have equal logits at
any level. What a logit is wrong by is rounding of its products, ``Units.error``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from els_kernels.blocked_moments import in_order
from els_kernels.geometry import Geometry, band
from els_kernels.native.bank import Native
from els_kernels.native.block_sums import largest_window
from els_kernels.native.far_queries import MOST_ERROR, is_far
from els_kernels.native.moments_call import (
    COTANGENT,
    SHARES,
    STATISTICS,
    TANGENT,
    MomentCall,
    MomentRows,
)

_LOG2E = math.log2(math.e)
_MOST_BITS = 20.0
_HEADROOM, _DEAD, _LEAST, _SPARE = 40.0, 64.0, 126.4, 320.0
"""Bits: that a logit may exceed a running maximum; below it from which weights do not count; below
it at which they are no normal float, so 0; beside the logits that the integers have to hold."""


class Units(NamedTuple):
    """How the logits of a query are written as integers."""

    bits: float
    """log₂ of the units of a bit, of which as many are used as fit."""
    product: float
    """Units of a product of centred pixels of query and key."""
    norm: float
    """Units of a key's squared norm; negative."""
    lowest: float
    """Units that no logit is below."""
    forbidden: float
    """Units that are added to what is no source."""
    error: float
    """Bits that a logit may be wrong by."""

    @property
    def scale(self) -> float:
        """Bits of one unit, at most ``_DEAD``, as powers of two below 2^-127 are no float32.

        A larger unit counts as that many bits: in float32 one unit below a maximum weighs nothing
        either way.
        """
        return min(math.exp2(-self.bits), _DEAD)

    def of(self, bits: float) -> int:
        """Return the least number of units, at least 1, that are so many bits."""
        return max(1, math.ceil(bits * math.exp2(self.bits)))


def units(
    query: float, key: float, pixels: int, a: float, s: float, *, same: bool = False
) -> Units:
    """Return the units in which logits of patches of these norms fit 31 bits.

    Args:
        query: largest norm of a centred patch of the query.
        key: largest norm of a centred patch of the bank.
        pixels: of a patch.
        a: signal scale.
        s: noise scale.
        same: whether sources are the same place: what is no source has any logit, else any product.
    """
    per_product = a / s / s * _LOG2E
    per_norm = -(a / s) * (a / s) * _LOG2E / 2
    # A logit is a product of at most 2qk bits minus k², for keys of any norm up to k.
    root = math.sqrt(_LOG2E / 2)
    q, k = query / s * root, a / s * key * root
    highest = q * q if q < k else 2 * q * k - k * k
    lowest = -(2 * q * k + k * k)
    most, least = (highest, lowest) if same else (2 * q * k, -2 * q * k)
    forbidden = lowest - most - _SPARE
    spread = 1.01 * (highest - least - forbidden) + _SPARE
    bits = min(_MOST_BITS, 31 - math.log2(spread))
    unit = math.exp2(bits)
    # Products and norm are rounded to units, products to floats before.
    rounding = pixels / 2 + 1 + 2.0**-24 * (2 * q * k + k * k) * unit
    return Units(
        bits,
        per_product * unit,
        per_norm * unit,
        math.floor(lowest * unit - 2 * rounding) - 1.0,
        math.floor(forbidden * unit - 4 * rounding) - 2.0,
        rounding / unit,
    )


class NativeMoments:
    """Moments of the posterior of a ``Native``, whose packed bank it shares.

    One image at a time. Results have the same bits for any number of threads.
    """

    def __init__(self, native: Native) -> None:
        self._native = native
        self._norms: dict[tuple[int, str], float] = {}
        self._variance: float | None = None

    def query(
        self,
        x: Tensor,
        a: float,
        s: float,
        window: int,
        limits: tuple[int, int],
        geometry: Geometry,
    ) -> NativeQuery:
        """Return the query of one image [C, H, W]; arguments are validated, and not whole."""
        return NativeQuery(self, x, a, s, window, limits, geometry)

    @property
    def native(self) -> Native:
        """The packed bank."""
        return self._native

    def key_norm(self, window: int, geometry: Geometry) -> float:
        """Return a bound of the norm of a centred patch of the bank; computed once."""
        name = (window, geometry.padding)
        if name not in self._norms:
            # Sums of float32 numbers.
            self._norms[name] = math.sqrt(self._native.square_norm(window) * (1 + 1e-4))
        return self._norms[name]

    def variance(self) -> float:
        """Return the mean square of a centred pixel of the bank; computed once."""
        if self._variance is None:
            pixels = self._native.blocks.images * math.prod(self._native.shape[1:])
            self._variance = sum(self._native.block_squares()) / pixels
        return self._variance


class NativeQuery:
    """One query image: its units, and the passes over the bank that it asks for."""

    def __init__(
        self,
        moments: NativeMoments,
        x: Tensor,
        a: float,
        s: float,
        window: int,
        limits: tuple[int, int],
        geometry: Geometry,
    ) -> None:
        self._native, self._limits = moments.native, limits
        self._window, self._geometry = window, geometry
        self._jacobian_scale = a / (s * s)
        self._centre = self._native.centre
        query = x.double() - a * self._centre[:, None, None]
        norm = math.sqrt(largest_window(query.square().sum(0)[None], window))
        key = moments.key_norm(window, geometry)
        height, width = x.shape[1:]
        pixels = min(window, height) * min(window, width)
        same = geometry.sources == "same"
        self.units = units(norm, key, pixels, a, s, same=same)
        far = is_far(float(query.abs().amax()), self._native.largest, a, s)
        self.is_unresolved = far and self.units.error * math.log(2) > MOST_ERROR
        """Whether the query is far from the bank and needs float64: see ``far_queries``."""
        self._scaled = (query * self.units.product).float().contiguous()
        # The mean of a posterior whose prior is Gaussian: near enough to centre sums. About a place
        # far beyond the pixels of the bank they would cancel.
        signal = a * a * moments.variance()
        farthest = moments.key_norm(1, geometry)
        reference = (query * (signal / (signal + s * s) / a)).clamp_(-farthest, farthest)
        self._reference = reference.float().contiguous()
        self.known: Tensor | None = None
        """``evidence``, if it was computed before."""

    def statistics(self, top: int, images: int, shares: bool) -> tuple[Tensor, ...]:
        """Return the fields of ``PosteriorStatistics`` for one image."""
        peak, sums, ranked = self._pass(STATISTICS, top=top)
        total, surprise = sums[0], sums[1]
        mean = sums[2::2] / total
        variance = (sums[3::2] / total - mean.square()).clamp_(min=0)
        scale = self.units.scale
        entropy = (total.log2() - surprise * scale / total).mul_(math.log(2)).clamp_(min=0)
        sources, weights = self._ranked(*ranked, peak, total)
        part = mean.new_zeros(images if shares else 0)
        if shares:
            lo, hi = self._limits
            rate = total.reciprocal().float()
            # What weights lack for being rounded, and not counted where they are below 2^-64.
            part[lo:hi] = self._pass(SHARES, peak=peak, rate=rate)[1]
            part /= part.sum()
        return (
            self._pixels(mean),
            variance.float(),
            entropy.float(),
            sources,
            weights.float(),
            part,
        )

    def jvp(self, tangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and J u, [C, H, W] float64."""
        along = (tangent * self._reference).sum(0)
        rows, cols = (band(length, self._window, self._geometry.padding) for length in along.shape)
        peak, total, mean = self._posterior()
        _, sums, _ = self._pass(
            TANGENT,
            peak=peak,
            mean=mean.float(),
            direction=tangent.float(),
            offset=(rows @ along @ cols.T).float(),
        )
        return self._pixels(mean).double(), sums / total * self._jacobian_scale

    def vjp(self, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and Jᵀg, [C, H, W] float64."""
        peak, total, mean = self._posterior()
        _, sums, _ = self._pass(
            COTANGENT, peak=peak, mean=mean.float(), cotangent=(cotangent / total).float()
        )
        # Scalars of a place add up to 0, but for rounding: keys may be measured from anywhere.
        product = sums[1:] - self._reference * sums[0]
        return self._pixels(mean).double(), product * self._jacobian_scale

    def evidence(self) -> Tensor:
        """Return the result of the first pass, [2 + C, H, W] float64: see ``_posterior``."""
        peak, total, mean = self._posterior()
        return torch.cat([peak.double()[None], total[None], mean])

    def _posterior(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return peaks, sums of weights, and means measured from the reference."""
        if self.known is not None:
            return self.known[0].to(torch.int32), self.known[1], self.known[2:]
        peak, sums, _ = self._pass(STATISTICS)
        return peak, sums[0], sums[2::2] / sums[0]

    def _pixels(self, mean: Tensor) -> Tensor:
        return (mean + self._reference + self._centre.float()[:, None, None]).float()

    def _ranked(
        self, logits: Tensor, origins: Tensor, peak: Tensor, total: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return sources [H, W, top, 3] and their weights [H, W, top] float64."""
        missing = logits < 0
        weights = ((logits.double() - peak[..., None]) * self.units.scale).exp2_()
        weights = (weights / total[..., None]).masked_fill_(missing, 0)
        image, place = origins.unbind(-1)
        width = logits.shape[1]
        row = place.div(width, rounding_mode="floor").masked_fill_(missing, -1)
        col = place.remainder(width).masked_fill_(missing, -1)
        return torch.stack([image, row, col], -1), weights.clamp_(max=1)

    def _pass(
        self, kind: int, *, top: int = 0, **inputs: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Return peaks [H, W], sums (see ``MomentSums``), logits and origins of listed sources.

        Args:
            kind: of pass.
            top: number of sources.
            inputs: fields of ``MomentQuery``, float32, and ``peak`` of the first pass for a second.
        """
        units = self.units
        numbers = {
            "norm": units.norm,
            "scale": units.scale,
            "origin": int(-units.lowest),
            "forbidden": int(units.forbidden - units.lowest),
            "headroom": units.of(_HEADROOM) - 1,
            "dead": -units.of(_DEAD),
            "least": -max(1, math.floor(_LEAST * math.exp2(units.bits))),
        }
        inputs |= {"units": self._scaled, "reference": self._reference}
        call = MomentCall(
            kind, self._geometry, self._window, top, self._limits, numbers,
            {name: value.contiguous() for name, value in inputs.items()},
        )  # fmt: skip
        rows = self._native.moment_rows(call)
        if kind == STATISTICS:
            peak, sums = _merged(rows, units.scale)
        else:
            peak = inputs["peak"]
            sums = rows.shares if kind == SHARES else in_order(list(rows.sums))
        return peak, sums, (rows.logits, rows.origins)


def _merged(rows: MomentRows, scale: float) -> tuple[Tensor, Tensor]:
    """Return peaks [H, W] and sums [2 + 2C, H, W] of statistics of blocks, merged in order."""
    peak = rows.peaks.amax(0)
    parts = []
    for own, sums in zip(rows.peaks, rows.sums, strict=True):
        behind = (own - peak).double()
        part = sums.clone()
        part[1] += behind * sums[0]
        parts.append(part.mul_((behind * scale).exp2_()))
    return peak, in_order(parts)
