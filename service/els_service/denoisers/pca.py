"""PCA-locality: a posterior over the bank for each coordinate, from those that correlate with it.

Lukoianov et al., "Locality in image diffusion models emerges from data statistics", 2025, with
one exact softmax over all images.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from els_service.denoisers.analytic import bank_bytes, bank_info
from els_service.denoisers.banks import Bank
from els_service.denoisers.base import Denoised, DenoiserInfo, Query
from els_service.denoisers.gradients import Direction, Product
from els_service.denoisers.pca_masks import DEFAULT_THRESHOLD, Rule, ThresholdTable, mask_of
from els_service.denoisers.pca_posterior import Posterior
from els_service.denoisers.pca_tiles import TiledMask, tile_order, tile_sizes
from els_service.denoisers.query_checks import check_query
from els_service.denoisers.spectra import (
    Spectrum,
    check_dimensions,
    count_numbers,
    spectrum_of,
)
from els_service.errors import InvalidArgumentError

Covariance = Literal["label", "all"]
COVARIANCES: tuple[Covariance, ...] = ("label", "all")

_MASKS_BYTES = 64 << 20
"""Maximum size of cached masks, one bit an entry: 54 of 3,072 dimensions."""
_MATMUL = 4e10
"""Operations per second of one thread in float32 (measured); half as many in float64."""
_NUMBER_S = 1.5e-8
"""Seconds of one thread for each number of the bank beside the matmul (measured)."""
_IMAGE_S = 1e-3


class PcaDenoiser:
    """The machine of PCA-locality over a bank.

    With z = x/a, σ = s/a, images v of the bank (those of the label) and the mask M of the level,

        L_v(m) = -Σ_n M[n, m] (z[n] - v[n])² / (2σ²),    D(x)[m] = Σ_v softmax_v(L_v(m)) v[m].

    Coordinates m and n are pixels of a channel. ``log_evidence`` of a pixel is the sum over its
    channels of log Σ_v exp L_v(m).

    Args:
        bank: the images.
        rule: normalisation of masks, see ``pca_masks.mask_of``.
        threshold: τ by noise level; None for ``DEFAULT_THRESHOLD``.
        covariance: of masks for a label: that of its images, or of all.
        device: device of the bank.
        spectra: covariances of another machine over the same bank and device, to be shared.
        masks_bytes: maximum size of cached masks, one bit an entry.

    Raises:
        ValueError: The images have more than ``MAX_DIMENSIONS`` numbers, or there are less than 2.
    """

    def __init__(
        self,
        bank: Bank,
        *,
        rule: Rule = "correlation",
        threshold: ThresholdTable | None = None,
        covariance: Covariance = "label",
        device: str = "cpu",
        spectra: BankSpectra | None = None,
        masks_bytes: int = _MASKS_BYTES,
    ) -> None:
        self._bank, self._rule, self._covariance = bank, rule, covariance
        self.threshold = threshold or ThresholdTable.constant(DEFAULT_THRESHOLD)
        self.spectra = spectra or BankSpectra(bank, device)
        self._masks = _Masks(masks_bytes)
        self._info = DenoiserInfo(
            kind="pca",
            shape=bank.shape,
            machine="pca" if rule == "correlation" else "pca-released",
            label_count=bank.label_count,
            label_names=bank.label_names,
            bank=bank_info(bank),
            has_log_evidence=True,
            has_gradients=True,
            has_originality=True,
            implementation="torch",
            memory_bytes=bank_bytes(bank) + 8 * count_numbers(bank) + masks_bytes,
        )

    def with_threshold(self, tau: float) -> PcaDenoiser:
        """Return the machine with another τ at every level, which shares bank and covariances."""
        return PcaDenoiser(
            self._bank,
            rule=self._rule,
            threshold=ThresholdTable.constant(tau),
            covariance=self._covariance,
            spectra=self.spectra,
            masks_bytes=self._masks.max_bytes,
        )

    @property
    def info(self) -> DenoiserInfo:
        """Description of the machine."""
        return self._info

    @property
    def bank(self) -> Bank:
        """Images of the machine."""
        return self._bank

    def check(self, query: Query) -> None:
        """Raise InvalidArgumentError if the shape or a label is wrong, or a window is given."""
        check_query(self._info, query)
        for label in np.unique(query.labels).tolist():
            first, last = self._bank.label_range(label)
            if self._covariance == "label" and last - first < 2:
                expected = "one with at least 2 images, for their covariance"
                raise InvalidArgumentError("label", expected, label)

    def predict_seconds(self, query: Query) -> float:
        """Return the time of the matmul of each image, and of masks of new levels."""
        size, threads = math.prod(self._info.shape), torch.get_num_threads()
        seconds, fresh = _IMAGE_S * len(query), set()
        for key, label in zip(self._keys(query), query.labels.tolist(), strict=True):
            first, last = self._bank.label_range(label)
            numbers = (last - first) * size
            seconds += numbers * (2 * size / _MATMUL + _NUMBER_S) / threads
            if key not in self._masks:
                fresh.add(key)
        spectra = {key.label for key in fresh} - self.spectra.known
        return seconds + (4 * len(fresh) + 20 * len(spectra)) * size**3 / _MATMUL / threads

    def denoise(self, query: Query) -> Denoised:
        """Return posterior means and log evidences."""
        answers = [self._one(query, i).posterior() for i in range(len(query))]
        mean = self.spectra.as_images([answer.mean for answer in answers])
        by_channel = [answer.evidence for answer in answers]
        return Denoised(mean, self.spectra.as_images(by_channel).sum(1))

    def vjp(self, query: Query, cotangent: npt.NDArray[np.float32]) -> Product:
        """Return D(x) and Jᵀg, exactly."""
        return self._product(query, cotangent, "vjp")

    def jvp(self, query: Query, tangent: npt.NDArray[np.float32]) -> Product:
        """Return D(x) and J u, exactly."""
        return self._product(query, tangent, "jvp")

    def predict_product_seconds(self, query: Query, direction: Direction) -> float:
        """Return three times the time of ``denoise``: three matmuls in place of one."""
        return 3 * self.predict_seconds(query)

    def _product(self, query: Query, along: npt.NDArray[np.float32], kind: Direction) -> Product:
        means, products = [], []
        for i, direction in enumerate(self.spectra.ordered(torch.tensor(along))):
            one = self._one(query, i)
            answer = one.posterior()
            multiply = one.vjp if kind == "vjp" else one.jvp
            means.append(answer.mean)
            products.append(multiply(answer, direction.to(self.spectra.device)) / query.level.a[i])
        return Product(self.spectra.as_images(means), self.spectra.as_images(products))

    def _keys(self, query: Query) -> list[_Key]:
        own = self._covariance == "label"
        return [
            _Key(label if own else -1, sigma, tau)
            for label, sigma, tau in zip(
                query.labels.tolist(),
                query.level.sigma.tolist(),
                self.threshold.at(query.level.sigma).tolist(),
                strict=True,
            )
        ]

    def _one(self, query: Query, i: int) -> Posterior:
        """Return the posterior of image i, alone, so that its bits are those in any batch."""
        (key,) = self._keys(query[i : i + 1])
        mask = self._masks.get(key, self.spectra, self._rule)
        images = self.spectra.centred[slice(*self._bank.label_range(int(query.labels[i])))]
        z = self.spectra.ordered(query.x[i]).double() / query.level.a[i]
        y = z.to(self.spectra.device) - self.spectra.centre.double()
        return Posterior(images, self.spectra.centre, mask, y, key.sigma)


@dataclass(frozen=True)
class _Key:
    """Label (-1: all), noise level and threshold of a mask."""

    label: int
    sigma: float
    tau: float


class BankSpectra:
    """Images of a bank about their mean, and covariances of its labels, computed at first use.

    Args:
        bank: the images.
        device: device that holds them.

    Raises:
        ValueError: The images have more than ``MAX_DIMENSIONS`` numbers, or there are less than 2.
    """

    def __init__(self, bank: Bank, device: str) -> None:
        check_dimensions(math.prod(bank.shape))
        if len(bank) < 2:
            raise ValueError(f"bank: expected at least 2 images, got {len(bank)}")
        self._bank, self.device = bank, device
        self._order = tile_order(bank.shape)
        self.tiles = tile_sizes(bank.shape)
        pixels = bank.pixels().flatten(1)[:, self._order]
        # About the mean, logits have no large common terms, which rounding would not leave equal.
        self.centre = pixels.double().mean(0).float().to(device)
        self.centred = pixels.to(device) - self.centre
        self._spectra: dict[int, Spectrum] = {}

    def ordered(self, images: Tensor) -> Tensor:
        """Return images [..., C, H, W] as coordinates in the order of tiles, [..., D]."""
        return images.flatten(-3)[..., self._order]

    def as_images(self, coordinates: list[Tensor]) -> npt.NDArray[np.float32]:
        """Return images [B, C, H, W] of coordinates [D] each in the order of tiles."""
        stacked = torch.stack(coordinates).float().cpu()
        images = torch.empty_like(stacked)
        images[:, self._order] = stacked
        pixels: npt.NDArray[np.float32] = images.view(-1, *self._bank.shape).numpy()
        return pixels

    @property
    def known(self) -> set[int]:
        """Labels whose covariance has been computed."""
        return set(self._spectra)

    def of_label(self, label: int) -> Spectrum:
        """Return the spectrum of a label's images, of all for -1.

        Of the covariance with 1/(N - 1), as the paper has it.
        """
        if label not in self._spectra:
            images = self.centred[slice(*self._bank.label_range(label))].cpu()
            found = spectrum_of(images)
            values = found.values * (len(images) / (len(images) - 1))
            self._spectra[label] = Spectrum(found.mean, found.vectors, values)
        return self._spectra[label]


class _Masks:
    """Cache of masks, one bit an entry; the least recently used leave."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._packed: OrderedDict[_Key, npt.NDArray[np.uint8]] = OrderedDict()
        self._last: tuple[_Key, TiledMask] | None = None

    def __contains__(self, key: _Key) -> bool:
        return key in self._packed

    def get(self, key: _Key, spectra: BankSpectra, rule: Rule) -> TiledMask:
        """Return the mask of a level."""
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        size = len(spectra.centre)
        if key not in self._packed:
            found = mask_of(spectra.of_label(key.label), key.sigma, key.tau, rule)
            self._packed[key] = np.packbits(found.numpy(), axis=1)
        self._packed.move_to_end(key)
        while len(self._packed) > 1 and len(self._packed) * size * size // 8 > self.max_bytes:
            self._packed.popitem(last=False)
        bits = np.unpackbits(self._packed[key], axis=1, count=size)
        mask = TiledMask(torch.from_numpy(bits).bool(), spectra.tiles, spectra.device)
        self._last = key, mask
        return mask
