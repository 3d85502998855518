"""The denoiser of large pictures: a fixed random part of their patches answers.

The cost of a query is proportional to the number of patches. At each scale with more than asked
for, strips of patches, as wide as a picture, are drawn by a seed; they are the same for all
queries, so that a model remains one denoiser with one fingerprint.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from els_kernels import FOLD_GEOMETRIES, FoldedAttention, count_fold_work
from els_service.denoisers.base import Denoised, DenoiserInfo, Query, make_query
from els_service.denoisers.levels import MAX_SIGMA, NoiseLevel
from els_service.denoisers.noise import seeded_noise, standard_normal
from els_service.denoisers.picture import PictureDenoiser
from els_service.denoisers.pyramids import Size

_GEOMETRY = FOLD_GEOMETRIES["els", "inside"]
_STRIP = 2
"""Rows of patches of a strip, in patches: sums over rows begin anew in each."""
_UNIFORM = MAX_SIGMA * (1 - 1e-9)
"""Lowest s/a at which the posterior is uniform."""
_PROBE = 48
"""Longest side of the query of which the error is measured."""
PROBED = (0.25, 0.5, 0.75)
"""α at which the error is measured, σ = 1 - α."""


@dataclass(frozen=True, eq=False)
class PatchSubset:
    """Parts of the pictures of each scale, float32 [C, h, w], those of one scale in a row."""

    images: tuple[Tensor, ...]
    ranges: tuple[tuple[int, int], ...]
    """Range of the images of each scale."""

    def of(self, label: int) -> tuple[int, int]:
        """Return the range of images of a scale; -1 means all scales."""
        return self.ranges[label] if label >= 0 else (0, len(self.images))

    def sizes(self, label: int) -> tuple[Size, ...]:
        """Return the sizes of the images of a scale."""
        return tuple((im.shape[1], im.shape[2]) for im in self.images[slice(*self.of(label))])


def all_patches(scales: Sequence[Sequence[Tensor]]) -> PatchSubset:
    """Return the pictures [C, h, w] of each scale, whole."""
    ends = [0, *itertools.accumulate(map(len, scales))]
    return PatchSubset(tuple(itertools.chain(*scales)), tuple(itertools.pairwise(ends)))


def patch_subset(
    scales: Sequence[Sequence[Tensor]], *, patch: int, sources: int, seed: int
) -> PatchSubset:
    """Return at most ``sources`` patches of each scale, but at least one strip.

    Args:
        scales: pictures [C, h, w] of each scale, at least as large as a patch.
        patch: side of a patch.
        sources: number of patches, at least 1.
        seed: 0 ≤ seed < 2⁶⁴.
    """
    return all_patches(
        [
            pictures
            if _patches(pictures, patch) <= sources
            else _strips(pictures, patch, sources, (seed, scale))
            for scale, pictures in enumerate(scales)
        ]
    )


def _strips(
    pictures: Sequence[Tensor], patch: int, sources: int, key: tuple[int, int]
) -> list[Tensor]:
    """Return strips of pictures; neighbours are joined, as their patches overlap."""
    places = [
        (index, row, min(row + _STRIP * patch, picture.shape[1] - patch + 1))
        for index, picture in enumerate(pictures)
        for row in range(0, picture.shape[1] - patch + 1, _STRIP * patch)
    ]
    chosen: list[tuple[int, int, int]] = []
    left = sources
    for at in np.argsort(standard_normal(*key, 0, len(places)), kind="stable").tolist():
        index, row, end = places[at]
        count = (end - row) * (pictures[index].shape[2] - patch + 1)
        if chosen and count > left:
            break
        chosen.append(places[at])
        left -= count
    joined: list[tuple[int, int, int]] = []
    for index, row, end in sorted(chosen):
        if joined and joined[-1][::2] == (index, row):
            joined[-1] = (index, joined[-1][1], end)
        else:
            joined.append((index, row, end))
    return [pictures[i][:, row : end + patch - 1].contiguous() for i, row, end in joined]


def _patches(images: Sequence[Tensor], patch: int) -> int:
    """Return the number of patches wholly inside images."""
    return sum((im.shape[1] - patch + 1) * (im.shape[2] - patch + 1) for im in images)


class SubsetDenoiser:
    """A picture denoiser whose bank is a part of the patches; it has no sources or gradients.

    At the highest level, where the posterior is uniform, it answers as all patches do.

    Args:
        exact: denoiser of all patches.
        whole: the pictures of ``exact``.
        subset: the patches that answer.
        attention: fold of ``subset.images``.
        patch: side of a patch.
        fold: ρ.
        name: of the subset, for the fingerprint.
    """

    def __init__(
        self,
        exact: PictureDenoiser,
        whole: PatchSubset,
        subset: PatchSubset,
        attention: FoldedAttention,
        *,
        patch: int,
        fold: float,
        name: str,
    ) -> None:
        self._exact, self._whole, self._subset, self._attention = exact, whole, subset, attention
        self._patch, self._fold = patch, fold
        info = exact.info
        assert info.bank is not None
        digest = hashlib.sha256(f"{info.bank.fingerprint} {name}".encode()).hexdigest()
        self._info = replace(
            info,
            bank=replace(info.bank, fingerprint=digest),
            has_gradients=False,
            has_sources=False,
            memory_bytes=info.memory_bytes + 8 * sum(im.numel() for im in subset.images),
        )

    @property
    def info(self) -> DenoiserInfo:
        """Description of the denoiser."""
        return self._info

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of patches of each scale."""
        ranges = self._subset.ranges
        return tuple(_patches(self._subset.images[lo:hi], self._patch) for lo, hi in ranges)

    def check(self, query: Query) -> None:
        """Raise InvalidArgumentError if the shape or a label is not supported."""
        self._exact.check(query)

    def predict_seconds(self, query: Query) -> float:
        """Return the estimate for all patches, reduced as the number of logits is."""
        size = query.pixels.shape[2], query.pixels.shape[3]
        return sum(
            self._exact.predict_seconds(query[slice(index, index + 1)]) * self._share(label, size)
            for index, label in enumerate(query.labels.tolist())
        )

    def _share(self, label: int, size: Size) -> float:
        part, whole = (
            _logits(size, bank.sizes(label), self._patch) for bank in (self._subset, self._whole)
        )
        return min(1.0, part / whole)

    def denoise(self, query: Query) -> Denoised:
        """Return posterior means, without evidence."""
        uniform = query.level.sigma >= _UNIFORM
        means = np.empty_like(query.pixels)
        for index in np.flatnonzero(uniform).tolist():
            one = query[slice(index, index + 1)]
            means[index] = self._exact.denoise(one).pixels[0]
        (others,) = np.nonzero(~uniform)
        if len(others):
            posterior = self._attention(
                query.x[torch.from_numpy(others)].to(self._attention.device),
                a=torch.tensor(query.level.a)[others],
                s=torch.tensor(query.level.s)[others],
                window=torch.full((len(others),), self._patch),
                fold=torch.full((len(others),), self._fold, dtype=torch.float64),
                ranges=torch.tensor([self._subset.of(k) for k in query.labels[others].tolist()]),
                geometry=_GEOMETRY,
            )
            means[others] = posterior.mean.cpu().numpy()
        return Denoised(means, None)

    def errors(self) -> list[float]:
        """Return ‖D - D of all patches‖ / ‖D of all patches‖ at each α of ``PROBED``.

        D is that of a part of the first picture, mirrored and noised, at the finest scale.
        """
        label = len(self._whole.ranges) - 1
        first, _ = self._whole.of(label)
        image = self._whole.images[first].flip(2)[:, :_PROBE, :_PROBE]
        noise = seeded_noise(0, 1, (image.shape[0], image.shape[1], image.shape[2]))(0)
        found = []
        for alpha in PROBED:
            level = NoiseLevel(np.array([alpha]), np.array([1 - alpha]))
            query = make_query((alpha * image[None] + (1 - alpha) * noise).float(), level, label)
            whole, part = self._exact.denoise(query).mean, self.denoise(query).mean
            found.append(float((part - whole).norm() / whole.norm()))
        return found


@lru_cache(maxsize=256)
def _logits(query: Size, images: tuple[Size, ...], patch: int) -> int:
    """Return the number of logits of a query of a size and images of sizes."""
    return sum(count_fold_work(_GEOMETRY, query, image, patch) for image in images)
