"""The denoiser of large pictures: a fixed random part of their patches answers.

The cost of a query is proportional to the number of patches. At each scale with more than asked
for, strips of patches, as wide as a picture, are drawn by a seed; they are the same for all
queries, so that a model remains one denoiser with one fingerprint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from els_kernels import FOLD_GEOMETRIES, FoldedAttention, count_fold_work
from els_service.denoisers.base import Denoised, DenoiserInfo, Query, make_query
from els_service.denoisers.explanations import Explanation, explanation
from els_service.denoisers.gradients import Direction
from els_service.denoisers.levels import NoiseLevel
from els_service.denoisers.noise import seeded_noise, standard_normal
from els_service.denoisers.picture import FoldOfPictures, PictureDenoiser
from els_service.denoisers.picture_banks import PictureBank
from els_service.denoisers.pyramids import Size

_GEOMETRY = FOLD_GEOMETRIES["els", "inside"]
_STRIP = 2
"""Rows of patches of a strip, in patches: sums over rows restart in each."""
_PROBE = 48
"""Longest side of the query of which the error is measured."""
PROBED = (0.25, 0.5, 0.75)
"""α at which the error is measured, σ = 1 - α."""


_Rows = tuple[int, int, int]
"""Picture of a scale, its first row, and the row after the last."""


@dataclass(frozen=True, eq=False)
class PatchSubset:
    """Rows of the pictures of each scale, float32 [C, h, w], those of one scale in a row."""

    images: tuple[Tensor, ...]
    ranges: tuple[tuple[int, int], ...]
    """Range of the images of each scale."""
    origins: tuple[tuple[int, int], ...]
    """Number of the picture that an image is of, among those of all scales, and its first row."""

    def of(self, label: int) -> tuple[int, int]:
        """Return the range of images of a scale; -1 means all scales."""
        return self.ranges[label] if label >= 0 else (0, len(self.images))

    def sizes(self, label: int) -> tuple[Size, ...]:
        """Return the sizes of the images of a scale."""
        return tuple((im.shape[1], im.shape[2]) for im in self.images[slice(*self.of(label))])


def all_patches(scales: Sequence[Sequence[Tensor]]) -> PatchSubset:
    """Return the pictures [C, h, w] of each scale, whole."""
    return _parts_of(scales, [[(i, 0, im.shape[1]) for i, im in enumerate(s)] for s in scales])


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
    return _parts_of(
        scales,
        [
            [(index, 0, picture.shape[1]) for index, picture in enumerate(pictures)]
            if _patches(pictures, patch) <= sources
            else _strips(pictures, patch, sources, (seed, scale))
            for scale, pictures in enumerate(scales)
        ],
    )


def _parts_of(scales: Sequence[Sequence[Tensor]], rows: Sequence[Sequence[_Rows]]) -> PatchSubset:
    """Return the rows of pictures of each scale."""
    images: list[Tensor] = []
    origins: list[tuple[int, int]] = []
    ranges: list[tuple[int, int]] = []
    before = 0
    for pictures, parts in zip(scales, rows, strict=True):
        ranges.append((len(images), len(images) + len(parts)))
        for index, first, end in parts:
            images.append(pictures[index][:, first:end].contiguous())
            origins.append((before + index, first))
        before += len(pictures)
    return PatchSubset(tuple(images), tuple(ranges), tuple(origins))


def _strips(
    pictures: Sequence[Tensor], patch: int, sources: int, key: tuple[int, int]
) -> list[_Rows]:
    """Return strips of pictures; neighbours are joined, as their patches overlap.

    Two strips share no pixel.
    """
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
    return [(index, row, end + patch - 1) for index, row, end in joined]


def _patches(images: Sequence[Tensor], patch: int) -> int:
    """Return the number of patches wholly inside images."""
    return sum((im.shape[1] - patch + 1) * (im.shape[2] - patch + 1) for im in images)


class SubsetDenoiser(FoldOfPictures):
    """A picture denoiser whose bank is a part of the patches.

    At the highest level, where the posterior is uniform, it answers as all patches do. Explanations
    and Jacobian products are those of the part at every level; a source is a pixel of the picture,
    as in ``exact``.

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
        super().__init__(attention, subset.of, patch=patch, fold=fold)
        self._exact, self._whole, self._subset = exact, whole, subset
        self._bank = replace(exact.bank, part=name)
        # The last is that of a source that is missing, −1.
        self._origins = torch.tensor([*subset.origins, (-1, 0)])
        info = exact.info
        assert info.bank is not None
        self._info = replace(
            info,
            bank=replace(info.bank, fingerprint=self._bank.fingerprint),
            memory_bytes=info.memory_bytes + 8 * sum(im.numel() for im in subset.images),
        )

    @property
    def info(self) -> DenoiserInfo:
        """Description of the denoiser."""
        return self._info

    @property
    def bank(self) -> PictureBank:
        """The whole pictures at every scale."""
        return self._bank

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
        return self._reduced(query, self._exact.predict_seconds)

    def predict_explain_seconds(self, query: Query) -> float:
        """Return the estimate for all patches, reduced as the number of logits is."""
        return self._reduced(query, self._exact.predict_explain_seconds)

    def predict_product_seconds(self, query: Query, direction: Direction) -> float:
        """Return the estimate for all patches, reduced as the number of logits is."""
        return self._reduced(query, lambda one: self._exact.predict_product_seconds(one, direction))

    def _reduced(self, query: Query, predict: Callable[[Query], float]) -> float:
        size = query.pixels.shape[2], query.pixels.shape[3]
        return sum(
            predict(query[slice(index, index + 1)]) * self._share(label, size)
            for index, label in enumerate(query.labels.tolist())
        )

    def _share(self, label: int, size: Size) -> float:
        part, whole = (
            _logits(size, bank.sizes(label), self._patch) for bank in (self._subset, self._whole)
        )
        return min(1.0, part / whole)

    def denoise(self, query: Query) -> Denoised:
        """Return posterior means, without evidence."""
        others = self._attended(query)
        means = np.empty_like(query.pixels)
        for index in sorted(set(range(len(query))) - set(others.tolist())):
            one = query[slice(index, index + 1)]
            means[index] = self._exact.denoise(one).pixels[0]
        if len(others):
            means[others] = self._attend(query, others)
        return Denoised(means, None)

    def explain(self, query: Query, top: int) -> Explanation:
        """Return the statistics with the ``top`` sources of every pixel."""
        found = self._statistics(query, top)
        origins = self._origins.to(found.sources.device)
        image, row = origins[found.sources[..., 0]].unbind(-1)
        sources = torch.stack([image, found.sources[..., 1] + row, found.sources[..., 2]], -1)
        shares = found.shares.new_zeros(len(query), len(self._bank))
        shares.index_add_(1, origins[:-1, 0], found.shares)
        return explanation(found._replace(sources=sources, shares=shares), self._bank)

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
