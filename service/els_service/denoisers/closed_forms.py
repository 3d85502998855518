"""Closed-form denoisers: Gaussian priors with diagonal or full covariance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from els_kernels import checkpoint
from els_service.denoisers.analytic import bank_bytes, bank_info
from els_service.denoisers.answers import per_image
from els_service.denoisers.banks import Bank
from els_service.denoisers.base import Denoised, DenoiserInfo, Query
from els_service.denoisers.gradients import Direction, Product
from els_service.denoisers.query_checks import check_query
from els_service.denoisers.spectra import check_dimensions, count_numbers, spectrum_of

_LARGEST = {"mean": 1e9, "variance": 1e18}
"""Limits of the statistics, beyond which scores overflow at the lowest noise level."""


class GaussianDenoiser:
    """The posterior mean under x0 ~ N(μ, diag v): ``μ + a·v / (a²·v + s²) · (x - a·μ)``.

    Args:
        shape: (C, H, W).
        mean: μ, broadcastable to ``shape``.
        variance: v ≥ 0, broadcastable to ``shape``.

    Raises:
        ValueError: μ or v cannot be broadcast, is not finite or too large, or v is negative.
    """

    def __init__(self, shape: tuple[int, int, int], mean: Tensor, variance: Tensor) -> None:
        for name, value in (("mean", mean), ("variance", variance)):
            try:
                torch.broadcast_to(value, shape)
            except RuntimeError:
                raise ValueError(
                    f"{name}: expected something that broadcasts to {list(shape)}, "
                    f"got shape {list(value.shape)}"
                ) from None
            if not (value.abs() <= _LARGEST[name]).all():
                got = value.double().abs().max().item()
                raise ValueError(
                    f"{name}: expected finite numbers to {_LARGEST[name]:g}, got {got}"
                )
        if (variance < 0).any():
            raise ValueError(f"variance: expected >= 0, got {variance.min().item()}")
        # A scalar stays a Python float: same results as an array, and much faster.
        self._mean, self._variance = _float_or_array(mean), _float_or_array(variance)
        self._centred = not np.any(self._mean)
        statistics = (np.asarray(self._mean), np.asarray(self._variance))
        self._info = DenoiserInfo(
            kind="gaussian",
            shape=shape,
            has_gradients=True,
            memory_bytes=sum(array.nbytes for array in statistics),
        )

    @property
    def info(self) -> DenoiserInfo:
        """Description of the denoiser."""
        return self._info

    def check(self, query: Query) -> None:
        """Raise InvalidArgumentError if the shape is wrong, or a label or window is given."""
        check_query(self._info, query)

    def predict_seconds(self, query: Query) -> float:
        """Return a constant plus a few nanoseconds per pixel."""
        return 3e-5 + 4e-9 * query.pixels.size

    def denoise(self, query: Query) -> Denoised:
        """Return the posterior means, without evidence."""
        # numpy: on small images torch's dispatch takes longer than the arithmetic.
        levels = query.level.pairs
        if len(levels) == 1:
            # As below, in two thirds of the time.
            ((a, s),) = levels
            gain = self._gain(a, s)
            mean = query.pixels * np.float32(gain)
            if not self._centred:
                mean += np.float32(self._mean * (1 - gain * a))
            return Denoised(mean, None)
        gains = [self._gain(a, s) for a, s in levels]
        mean = query.pixels * per_image(gains)
        if not self._centred:
            rests = [
                self._mean * (1 - gain * a) for gain, (a, _) in zip(gains, levels, strict=True)
            ]
            mean += per_image(rests)
        return Denoised(mean, None)

    def vjp(self, query: Query, cotangent: npt.NDArray[np.float32]) -> Product:
        """Return D(x) and Jᵀg = J g: J is the diagonal matrix of the gain."""
        return self.jvp(query, cotangent)

    def jvp(self, query: Query, tangent: npt.NDArray[np.float32]) -> Product:
        """Return D(x) and J u, the gain times u."""
        gains = per_image([self._gain(a, s) for a, s in query.level.pairs])
        return Product(self.denoise(query).pixels, tangent * gains)

    def predict_product_seconds(self, query: Query, direction: Direction) -> float:
        """Return twice the time of ``denoise``."""
        return 2 * self.predict_seconds(query)

    def _gain(self, a: float, s: float) -> _Statistic:
        """Return the gain of ``D(x) = gain·x + (1 - gain·a)·μ``."""
        return a * self._variance / (a * a * self._variance + s * s)


_Statistic = float | npt.NDArray[np.float64]
"""A scalar, or an array that can be broadcast to [C, H, W]."""


def _float_or_array(statistic: Tensor) -> _Statistic:
    if statistic.numel() == 1:
        return float(statistic)
    missing = 3 - statistic.ndim
    return statistic.double().reshape((1,) * missing + statistic.shape).numpy()


@dataclass(frozen=True, eq=False)
class _Spectrum:
    """Mean [D] and eigenvectors [D, R] in float32, eigenvalues [R] in float64."""

    mean: Tensor
    vectors: Tensor
    values: Tensor

    def gain(self, sigma: float) -> Tensor:
        """Return λ/(λ+σ²), [R] float32."""
        return (self.values / (self.values + sigma**2)).float()


class WienerDenoiser:
    """The linear minimum mean square error denoiser of a bank, ``μ + U λ/(λ+σ²) Uᵀ (x/a - μ)``.

    A label restricts μ and covariance to its images; each label's spectrum is computed at its first
    use and cached.

    Raises:
        ValueError: The images have more than ``MAX_DIMENSIONS`` numbers.
    """

    def __init__(self, bank: Bank) -> None:
        check_dimensions(math.prod(bank.shape))
        self._bank, self._pixels = bank, bank.pixels().flatten(1)
        self._spectra = {-1: _spectrum(self._pixels)}
        self._info = DenoiserInfo(
            kind="wiener",
            shape=bank.shape,
            label_count=bank.label_count,
            label_names=bank.label_names,
            bank=bank_info(bank),
            has_originality=True,
            has_gradients=True,
            memory_bytes=bank_bytes(bank) + 4 * count_numbers(bank),
        )

    @property
    def info(self) -> DenoiserInfo:
        """Description of the denoiser."""
        return self._info

    @property
    def bank(self) -> Bank:
        """Images of the filter."""
        return self._bank

    def check(self, query: Query) -> None:
        """Raise InvalidArgumentError if the shape or a label is wrong, or a window is given."""
        check_query(self._info, query)
        for label in np.unique(query.labels):
            self._bank.label_range(int(label))

    def predict_seconds(self, query: Query) -> float:
        """Return the time of two matrix-vector products per image, plus spectra of new labels."""
        dimensions = self._pixels.shape[1]
        fresh = {int(label) for label in query.labels} - self._spectra.keys()
        return len(query) * 1e-9 * dimensions**2 + len(fresh) * 1e-9 * dimensions**3

    def denoise(self, query: Query) -> Denoised:
        """Return the posterior means, without evidence."""
        images = [
            # One product per image: rounding of a matmul depends on its number of rows.
            self._denoise_one(x.flatten(), float(a), float(s), int(label))
            for x, a, s, label in zip(
                query.x, query.level.a, query.level.s, query.labels, strict=True
            )
        ]
        return Denoised(torch.stack(images).view(query.pixels.shape).numpy(), None)

    def vjp(self, query: Query, cotangent: npt.NDArray[np.float32]) -> Product:
        """Return D(x) and Jᵀg = J g: J is symmetric."""
        return self.jvp(query, cotangent)

    def jvp(self, query: Query, tangent: npt.NDArray[np.float32]) -> Product:
        """Return D(x) and J u = U λ/(λ+σ²) Uᵀ u / a."""
        products = [
            self._multiply_one(u.flatten(), float(a), float(s), int(label))
            for u, a, s, label in zip(
                torch.tensor(tangent), query.level.a, query.level.s, query.labels, strict=True
            )
        ]
        shape = query.pixels.shape
        return Product(self.denoise(query).pixels, torch.stack(products).view(shape).numpy())

    def predict_product_seconds(self, query: Query, direction: Direction) -> float:
        """Return twice the time of ``denoise``."""
        return 2 * self.predict_seconds(query)

    def _multiply_one(self, u: Tensor, a: float, s: float, label: int) -> Tensor:
        spectrum = self._spectrum_of(label)
        return (
            torch.mv(spectrum.vectors, spectrum.gain(s / a) * torch.mv(spectrum.vectors.T, u)) / a
        )

    def _spectrum_of(self, label: int) -> _Spectrum:
        if label not in self._spectra:
            self._spectra[label] = _spectrum(self._pixels[slice(*self._bank.label_range(label))])
        return self._spectra[label]

    def _denoise_one(self, x: Tensor, a: float, s: float, label: int) -> Tensor:
        checkpoint()
        spectrum = self._spectrum_of(label)
        gain = spectrum.gain(s / a)
        coordinates = torch.mv(spectrum.vectors.T, x / a - spectrum.mean)
        return spectrum.mean + torch.mv(spectrum.vectors, gain * coordinates)


def _spectrum(images: Tensor) -> _Spectrum:
    """Return mean and principal axes of images [N, D]."""
    exact = spectrum_of(images)
    return _Spectrum(exact.mean.float(), exact.vectors.float(), exact.values)
