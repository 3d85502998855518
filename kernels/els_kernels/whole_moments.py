"""Posterior moments of the machines whose window is the whole image: ideal and equivariant.

One softmax over the bank images (ideal), or over every translation of every bank image
(equivariant: the ideal machine of the bank with its translations). All sums are matrix products of
the bank with the query's translations, float64; the response of a translation is moved back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from els_kernels.control import checkpoint
from els_kernels.displacements import decode
from els_kernels.geometry import Geometry

_TILE = 1 << 18
"""Numbers of one tile of bank images, and of its logits: 2 MiB."""


class Shifts:
    """Pairs of one query image with every translation of a range of bank images.

    Args:
        image: z = x/a, [C, H, W] float64.
        sigma: s/a.
        bank: the range, [N, C, H, W], float32 or uint8.
        geometry: whole.
    """

    def __init__(self, image: Tensor, sigma: float, bank: Tensor, geometry: Geometry) -> None:
        self._image, self._bank, self._scale = image, bank, -0.5 / (sigma * sigma)
        _, self._height, self._width = image.shape
        every = geometry.sources == "every"
        self._rows = self._height if every else 1
        self._cols = self._width if every else 1

    def posterior(self) -> tuple[Tensor, Tensor]:
        """Return the mean [C, H, W] and log Σ exp(logit) []."""
        peak = self._image.new_full((), -math.inf)
        total, mean = self._image.new_zeros(()), torch.zeros_like(self._image)
        for _, keys, dy, logits in self._tiles():
            top = torch.maximum(peak, logits.amax())
            weights = (logits - top).exp_()
            scale = (peak - top).exp()
            total = total * scale + weights.sum()
            mean = mean * scale + self._moved_back(weights @ keys, dy)
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
        offset = (mean * direction).sum()
        for _, keys, dy, logits in self._tiles():
            weights = (logits - log_sum).exp_()
            weights *= self._moved(direction, dy) @ keys.T - offset
            total = total + weights.sum()
            product += self._moved_back(weights @ keys, dy)
        return product - total * mean

    def statistics(self, top: int, mean: Tensor, log_sum: Tensor) -> tuple[Tensor, ...]:
        """Return the fields of ``moment_queries.Spread``.

        Over translations the first is Σ w v², as one centre does not fit all of them in a matrix
        product: exact to 1e-15 of the pixels' squares, far below what float32 shows beside D.

        Args:
            top: number of sources.
            mean: D, of the whole bank.
            log_sum: of the whole bank.
        """
        second, entropy = torch.zeros_like(mean), mean.new_zeros(())
        shares = mean.new_zeros(len(self._bank))
        best = mean.new_zeros(0)
        where = torch.zeros(0, 3, dtype=torch.int64, device=mean.device)
        for first, keys, dy, logits in self._tiles():
            surprise = log_sum - logits
            weights = surprise.neg().exp_()
            if self._rows == 1:
                second += (weights @ (keys - mean.flatten()).square()).view_as(mean)
            else:
                second += self._moved_back(weights @ keys.square(), dy)
            entropy += (weights * surprise).sum()
            shares[first : first + len(keys)] += weights.sum(0)
            best, where = _best(best, where, weights, (first, dy), top)
        listed = self._of_pixels(best, where, top)
        return second, entropy.expand_as(mean[0]), *listed, shares

    def _of_pixels(self, best: Tensor, where: Tensor, top: int) -> tuple[Tensor, Tensor]:
        """Return sources [H, W, top, 3] and weights [H, W, top] of the listed translations."""
        height, width = self._height, self._width
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

    def _tiles(self) -> Iterator[tuple[int, Tensor, int, Tensor]]:
        """Yield the first image, keys [T, CHW], the rows moved, and logits [columns, T]."""
        channels = len(self._image)
        together = _together((channels, self._height, self._width), self._cols)
        energy = self._image.square().sum()
        for first in range(0, len(self._bank), together):
            keys = decode(self._bank[first : first + together]).flatten(1)
            norms = keys.square().sum(1)
            for dy in range(self._rows):
                checkpoint()
                if self._rows == 1:
                    distances = (keys - self._image.flatten()).square_().sum(1)[None]
                else:
                    products = self._moved(self._image, dy) @ keys.T
                    distances = (norms + energy).sub(products, alpha=2)
                yield first, keys, dy, distances.mul(self._scale)

    def _moved(self, image: Tensor, dy: int) -> Tensor:
        """Return an image moved by dy rows and each number of columns: [columns, CHW]."""
        moved = [torch.roll(image, (dy, dx), (1, 2)).flatten() for dx in range(self._cols)]
        return torch.stack(moved)

    def _moved_back(self, responses: Tensor, dy: int) -> Tensor:
        """Return the sum of responses [columns, CHW], each moved back: [C, H, W]."""
        total = torch.zeros_like(self._image)
        for dx, response in enumerate(responses):
            total += torch.roll(response.view_as(total), (-dy, -dx), (1, 2))
        return total


def sweep_steps(images: int, shape: tuple[int, int, int], geometry: Geometry) -> int:
    """Return the number of steps of a pass over bank images of a shape (C, H, W)."""
    every = geometry.sources == "every"
    tiles = math.ceil(images / _together(shape, shape[2] if every else 1))
    return tiles * (shape[1] if every else 1)


def _together(shape: tuple[int, int, int], columns: int) -> int:
    """Return the bank images of one tile."""
    return max(1, min(_TILE // math.prod(shape), _TILE // columns))


def _best(
    best: Tensor, where: Tensor, weights: Tensor, at: tuple[int, int], top: int
) -> tuple[Tensor, Tensor]:
    """Return the largest weights with (image, dy, dx), those of a tile [columns, T] included."""
    first, dy = at
    found, order = weights.flatten().sort(descending=True, stable=True)
    found, order = found[:top], order[:top]
    count = weights.shape[1]
    rows = torch.full_like(order, dy)
    listed = torch.stack([order % count + first, rows, order // count], -1)
    merged, order = torch.cat([best, found]).sort(descending=True, stable=True)
    return merged[:top], torch.cat([where, listed])[order[:top]]
