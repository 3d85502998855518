"""Posterior moments of the machines whose window is the whole image: ideal and equivariant.

One softmax over the bank images (ideal), or over every translation of every bank image
(equivariant: the ideal machine of the bank with its translations). All sums are float64. Those over
translations are circular correlations, by Fourier transforms in H·W·log(H·W) operations an image; F
is the transform, d a displacement::

    Σ_u q[u] v[u+d] = F⁻¹(conj(F q) · F v)[d]        Σ_d w[d] v[u+d] = F⁻¹(conj(F w) · F v)[u]
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from els_kernels.control import checkpoint
from els_kernels.displacements import decode
from els_kernels.geometry import Geometry

_TILE, _GPU_TILE = 1 << 16, 1 << 22
"""Numbers of one tile of bank images. On a CPU one thread multiplies them, as the last bits of
torch's complex products depend on where threads part; their transforms fit the core's cache."""


class _Tile(ABC):
    """Some bank images v [T, C, H, W] float64, each a source under one or more displacements."""

    def __init__(self, keys: Tensor) -> None:
        self._keys = keys

    @abstractmethod
    def distances(self, image: Tensor) -> Tensor:
        """Return ‖z − v‖² for every displacement of v, [T, rows, columns]."""

    @abstractmethod
    def products(self, image: Tensor) -> Tensor:
        """Return ⟨u, v⟩ for every displacement of v, [T, rows, columns]."""

    @abstractmethod
    def responses(self, weights: Tensor) -> Tensor:
        """Return the sum of v under all displacements with weights, [C, H, W]."""

    @abstractmethod
    def squares(self, weights: Tensor, mean: Tensor) -> Tensor:
        """Return Σ w (v − D)², over several displacements Σ w v², [C, H, W]."""


class _Images(_Tile):
    """Images at their own place: displacement 0 alone."""

    def distances(self, image: Tensor) -> Tensor:
        return (self._keys - image).square_().sum((1, 2, 3))[:, None, None]

    def products(self, image: Tensor) -> Tensor:
        return (self._keys * image).sum((1, 2, 3))[:, None, None]

    def responses(self, weights: Tensor) -> Tensor:
        return torch.einsum("t,tchw->chw", weights.flatten(), self._keys)

    def squares(self, weights: Tensor, mean: Tensor) -> Tensor:
        gaps = (self._keys - mean).square_()
        return torch.einsum("t,tchw->chw", weights.flatten(), gaps)


class _Translations(_Tile):
    """Images under every displacement on the torus, two at a time in a complex transform.

    Complex transforms have the same bits whatever the number of threads; torch's inverse real ones
    do not.
    """

    def distances(self, image: Tensor) -> Tensor:
        norms = self._keys.square().sum((1, 2, 3))[:, None, None] + image.square().sum()
        return norms.sub(self.products(image), alpha=2)

    def products(self, image: Tensor) -> Tensor:
        spectra = self._spectra * torch.fft.fft2(image).conj()
        both: Tensor = torch.fft.ifft2(spectra.sum(1))
        return torch.cat([both.real, both.imag])[: len(self._keys)]

    def responses(self, weights: Tensor) -> Tensor:
        return _correlation(weights, self._spectra)

    def squares(self, weights: Tensor, mean: Tensor) -> Tensor:
        return _correlation(weights, torch.fft.fft2(_paired(self._keys.square())))

    @cached_property
    def _spectra(self) -> Tensor:
        spectra: Tensor = torch.fft.fft2(_paired(self._keys))
        return spectra


def _paired(images: Tensor) -> Tensor:
    """Return the first half of [T, ...] plus i times the other, which ends with 0 if T is odd."""
    half = (len(images) + 1) // 2
    other = torch.zeros_like(images[:half])
    other[: len(images) - half] = images[half:]
    return torch.complex(images[:half], other)


def _correlation(weights: Tensor, spectra: Tensor) -> Tensor:
    """Return Σ w[t, d] v[t, u+d], [C, H, W], of the spectra of pairs of v."""
    products = torch.fft.fft2(_paired(weights)).conj()[:, None] * spectra
    both: Tensor = torch.fft.ifft2(products.sum(0))
    return both.real


def _of_images(weights: Tensor) -> Tensor:
    """Return the sum of each image of [T, H, W], an axis at a time: bits as of one thread."""
    return weights.sum(2).sum(1)


class Shifts:
    """Pairs of one query image with the displacements of a range of bank images.

    Args:
        image: z = x/a, [C, H, W] float64.
        sigma: s/a.
        bank: the range, [N, C, H, W], float32, float64 or uint8.
        geometry: whole.
    """

    def __init__(self, image: Tensor, sigma: float, bank: Tensor, geometry: Geometry) -> None:
        self._image, self._bank, self._scale = image, bank, -0.5 / (sigma * sigma)
        self._every = geometry.sources == "every"

    def posterior(self) -> tuple[Tensor, Tensor]:
        """Return the mean [C, H, W] and log Σ exp(logit) []."""
        peak = self._image.new_full((), -math.inf)
        total, mean = self._image.new_zeros(()), torch.zeros_like(self._image)
        for _, tile, logits in self._tiles():
            top = torch.maximum(peak, logits.amax())
            weights = logits.sub_(top).exp_()
            scale = (peak - top).exp()
            total = total * scale + _of_images(weights).sum()
            mean = mean * scale + tile.responses(weights)
            peak = top
        return mean / total, peak + total.log()

    def covariance(self, direction: Tensor, mean: Tensor, log_sum: Tensor) -> Tensor:
        """Return Σ w (v − D) ⟨v − D, u⟩, [C, H, W].

        Args:
            direction: u, [C, H, W].
            mean: D, of ``posterior``.
            log_sum: of ``posterior``.
        """
        total, product = self._image.new_zeros(()), torch.zeros_like(self._image)
        direction = direction.double()
        offset = (mean * direction).sum()
        for _, tile, logits in self._tiles():
            weights = logits.sub_(log_sum).exp_()
            weights *= tile.products(direction) - offset
            total = total + _of_images(weights).sum()
            product += tile.responses(weights)
        return product - total * mean

    def statistics(self, top: int, mean: Tensor, log_sum: Tensor) -> tuple[Tensor, ...]:
        """Return the fields of ``moment_queries.Spread``.

        Over translations the first is Σ w v², as one centre does not fit all of them in a
        correlation: exact to 1e-15 of the pixels' squares, far below what float32 shows beside D.

        Args:
            top: number of sources.
            mean: D, of the whole bank.
            log_sum: of the whole bank.
        """
        second, entropy = torch.zeros_like(mean), mean.new_zeros(())
        shares = mean.new_zeros(len(self._bank))
        best = mean.new_zeros(0)
        where = torch.zeros(0, 3, dtype=torch.int64, device=mean.device)
        for first, tile, logits in self._tiles():
            surprise = log_sum - logits
            weights = surprise.neg().exp_()
            second += tile.squares(weights, mean)
            entropy += _of_images(weights * surprise).sum()
            shares[first : first + len(weights)] += _of_images(weights)
            best, where = _best(best, where, weights, first, top)
        listed = self._of_pixels(best, where, top)
        return second, entropy.expand_as(mean[0]), *listed, shares

    def _of_pixels(self, best: Tensor, where: Tensor, top: int) -> tuple[Tensor, Tensor]:
        """Return sources [H, W, top, 3] and weights [H, W, top] of the listed displacements."""
        height, width = self._image.shape[1:]
        row = torch.arange(height, device=best.device)[:, None, None]
        col = torch.arange(width, device=best.device)[None, :, None]
        shape = (height, width, len(best))
        sources = torch.full((height, width, top, 3), -1, device=best.device)
        sources[:, :, : len(best), 0] = where[:, 0].expand(shape)
        sources[:, :, : len(best), 1] = ((row + where[:, 1]) % height).expand(shape)
        sources[:, :, : len(best), 2] = ((col + where[:, 2]) % width).expand(shape)
        largest = best.new_zeros(height, width, top)
        largest[..., : len(best)] = best
        return sources, largest

    def _tiles(self) -> Iterator[tuple[int, _Tile, Tensor]]:
        """Yield the first image, a tile, and its logits [T, rows, columns]."""
        kind = _Translations if self._every else _Images
        together = _together(self._image.shape, self._image.device)
        for first in range(0, len(self._bank), together):
            checkpoint()
            tile = kind(decode(self._bank[first : first + together]))
            yield first, tile, tile.distances(self._image).mul_(self._scale)


def sweep_steps(images: int, shape: tuple[int, int, int], device: torch.device) -> int:
    """Return the number of steps of a pass over bank images of a shape (C, H, W)."""
    return math.ceil(images / _together(shape, device))


def _together(shape: tuple[int, ...], device: torch.device) -> int:
    """Return the bank images of one tile."""
    numbers = _TILE if device.type == "cpu" else _GPU_TILE
    return max(1, numbers // math.prod(shape))


def _best(
    best: Tensor, where: Tensor, weights: Tensor, first: int, top: int
) -> tuple[Tensor, Tensor]:
    """Return the largest weights with (image, dy, dx), those of a tile [T, H, W] included."""
    height, width = weights.shape[1:]
    found, order = weights.flatten().sort(descending=True, stable=True)
    found, order = found[:top], order[:top]
    image, place = order // (height * width), order % (height * width)
    listed = torch.stack([image + first, place // width, place % width], -1)
    merged, order = torch.cat([best, found]).sort(descending=True, stable=True)
    return merged[:top], torch.cat([where, listed])[order[:top]]
