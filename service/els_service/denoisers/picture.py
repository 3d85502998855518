"""The denoiser of pictures: the ELS machine whose bank is the patches of a few pictures.

Its labels are the scales of a pyramid, so that the pictures of one scale answer a query.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from els_kernels import FOLD_GEOMETRIES, FoldedAttention, count_fold_work
from els_service.denoisers.base import BankInfo, Denoised, DenoiserInfo, Integers, Query, SizeRange
from els_service.denoisers.folded import logit_seconds
from els_service.denoisers.levels import MAX_SIGMA
from els_service.denoisers.pyramids import Size, resized, scale_sizes
from els_service.denoisers.query_checks import check_query
from els_service.denoisers.windows import WindowTable
from els_service.errors import InvalidArgumentError

MAX_PICTURE_SIDE = 1024
"""Largest height and width of queries, without the border of a tileable picture."""
_GEOMETRY = FOLD_GEOMETRIES["els", "inside"]
_UNIFORM = MAX_SIGMA * (1 - 1e-9)
"""Lowest s/a at which the posterior is uniform."""
_IMAGE_S = 1e-3
"""Seconds of a query image beside its logits (measured)."""


@dataclass(frozen=True, eq=False)
class PictureBank:
    """Pictures at every scale, float32 [C, h, w] in [-1, 1]; those of one scale in a row.

    Args:
        images: of scale 0, the coarsest, then of scale 1, and so on.
        pictures: number of pictures, at least 1.
        source: origin of the pictures.
        licence: licence of the pictures.
    """

    images: tuple[Tensor, ...]
    pictures: int
    source: str = ""
    licence: str = ""

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Size of the first picture at each scale, coarsest first."""
        return tuple((im.shape[1], im.shape[2]) for im in self.images[:: self.pictures])

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of sizes and pixels."""
        digest = hashlib.sha256()
        for image in self.images:
            digest.update(repr(tuple(image.shape)).encode())
            digest.update(image.numpy().astype("<f4", copy=False).tobytes())
        return digest.hexdigest()

    def of(self, label: int) -> tuple[int, int]:
        """Return the range of images of a scale; -1 means all scales."""
        if label < 0:
            return 0, len(self.images)
        return label * self.pictures, (label + 1) * self.pictures


def picture_bank(
    pictures: Sequence[Tensor],
    *,
    coarsest: int,
    scales: int,
    source: str = "",
    licence: str = "",
) -> PictureBank:
    """Return pictures at every scale.

    Args:
        pictures: [C, H, W] in [-1, 1], of equal C, at the finest scale.
        coarsest: short side of the coarsest scale, in pixels.
        scales: number of scales.
        source: origin of the pictures.
        licence: licence of the pictures.
    """
    grids = [
        [
            # Bicubic resampling may leave the range.
            resized(picture.double()[None], size)[0].clamp(-1, 1).float().contiguous()
            for size in scale_sizes((picture.shape[1], picture.shape[2]), coarsest, scales)
        ]
        for picture in pictures
    ]
    images = tuple(itertools.chain.from_iterable(zip(*grids, strict=True)))
    return PictureBank(images, len(pictures), source, licence)


class PictureDenoiser:
    """The ELS machine of a few pictures, with patches wholly inside, for queries of any size.

    At the highest level, σ = 1e6, the posterior is uniform over all patches: D is the fold of their
    mean.

    Args:
        attention: fold of ``bank.images``.
        bank: the pictures at every scale.
        patch: side of a patch, odd; at most every side of the bank.
        fold: ρ, from 0.05 to infinity.
        steps: default steps of each scale.

    Raises:
        ValueError: The patch is larger than a picture at the coarsest scale.
    """

    def __init__(
        self, attention: FoldedAttention, bank: PictureBank, *, patch: int, fold: float, steps: int
    ) -> None:
        least = min(min(image.shape[1:]) for image in bank.images)
        if patch > least:
            expected = f"at most {least}, the shortest side of the coarsest scale"
            raise ValueError(f"patch: expected {expected}, got {patch}")
        self._attention, self._bank, self._patch, self._fold = attention, bank, patch, fold
        self._uniform: dict[int, Tensor] = {}
        """Scale → mean patch, [C, P, P] float64."""
        sides = (patch, MAX_PICTURE_SIDE + 2 * (patch - 1))
        sizes = bank.sizes
        pixels = sum(image[0].numel() for image in bank.images)
        channels = bank.images[0].shape[0]
        self._info = DenoiserInfo(
            kind="picture",
            shape=(channels, *sizes[-1]),
            machine="els",
            padding="inside",
            window=WindowTable.constant(patch),
            fold=fold,
            sizes=SizeRange(sides, sides),
            scales=sizes,
            scale_steps=steps,
            patch=patch,
            label_count=len(sizes),
            label_names=tuple(f"{h}x{w}" for h, w in sizes) if len(set(sizes)) > 1 else (),
            bank=BankInfo(bank.fingerprint, bank.pictures, bank.source, bank.licence),
            implementation=attention.implementation,
            # The fold holds the pixels of the bank, and no copy.
            memory_bytes=4 * channels * pixels,
        )

    @property
    def info(self) -> DenoiserInfo:
        """Description of the denoiser."""
        return self._info

    def check(self, query: Query) -> None:
        """Raise InvalidArgumentError if the shape or a label is not supported."""
        check_query(self._info, query)

    def predict_seconds(self, query: Query) -> float:
        """Return a rough estimate from the number of logits and the number of torch's threads."""
        size = query.pixels.shape[2], query.pixels.shape[3]
        taps = 1 if math.isinf(self._fold) else self._patch
        each = logit_seconds(self._info.implementation, self._info.shape[0], taps)
        work = sum(
            count_fold_work(_GEOMETRY, size, (image.shape[1], image.shape[2]), self._patch)
            for index in self._attended(query).tolist()
            for image in self._bank.images[slice(*self._bank.of(int(query.labels[index])))]
        )
        return len(query) * _IMAGE_S + each * work / torch.get_num_threads()

    def denoise(self, query: Query) -> Denoised:
        """Return posterior means, without evidence."""
        attended = self._attended(query)
        means = np.empty_like(query.pixels)
        if len(attended):
            labels = query.labels[attended].tolist()
            posterior = self._attention(
                query.x[torch.from_numpy(attended)].to(self._attention.device),
                a=torch.tensor(query.level.a)[attended],
                s=torch.tensor(query.level.s)[attended],
                window=torch.full((len(attended),), self._patch),
                fold=torch.full((len(attended),), self._fold, dtype=torch.float64),
                ranges=torch.tensor([self._bank.of(label) for label in labels]),
                geometry=_GEOMETRY,
            )
            means[attended] = posterior.mean.cpu().numpy()
        for index in sorted(set(range(len(query))) - set(attended.tolist())):
            size = query.pixels.shape[2], query.pixels.shape[3]
            means[index] = self._mean_everywhere(int(query.labels[index]), size).numpy()
        return Denoised(means, None)

    def _attended(self, query: Query) -> Integers:
        """Return the images whose posterior is not uniform."""
        return np.flatnonzero(query.level.sigma < _UNIFORM)

    def _mean_everywhere(self, label: int, size: Size) -> Tensor:
        """Return D [C, H, W] float32 of the uniform posterior: the fold of one mean patch."""
        if label not in self._uniform:
            self._uniform[label] = mean_patch(
                self._bank.images[slice(*self._bank.of(label))], self._patch
            )
        rows, cols = (fold_taps(length, self._patch, self._fold) for length in size)
        return torch.einsum("xo,cop,yp->cxy", rows, self._uniform[label], cols).float()


def mean_patch(images: Sequence[Tensor], patch: int) -> Tensor:
    """Return the mean of all patches wholly inside images [C, h, w]: [C, P, P] float64."""
    total, count = torch.zeros(images[0].shape[0], patch, patch, dtype=torch.float64), 0
    for image in images:
        places = image.shape[1] - patch + 1, image.shape[2] - patch + 1
        count += places[0] * places[1]
        for row, col in itertools.product(range(patch), range(patch)):
            part = image[:, row : row + places[0], col : col + places[1]]
            total[:, row, col] += part.sum((1, 2), dtype=torch.float64)
    return total / count


def fold_taps(length: int, patch: int, fold: float) -> Tensor:
    """Return the normalised weights [length, P] of the patches inside an axis that reach a place.

    Entry [p, o] is that of place p in the patch that starts at p - o. Relative to the largest, so
    that a place that only the border of a patch reaches has weights that do not vanish.
    """
    start = torch.arange(length)[:, None] - torch.arange(patch)
    inside = (start >= 0) & (start <= length - patch)
    offset = torch.linspace(-1, 1, patch, dtype=torch.float64) if patch > 1 else torch.zeros(1)
    log_weight = (-(offset.double() ** 2) / (2 * fold**2)).expand(length, patch)
    return log_weight.masked_fill(~inside, -math.inf).softmax(1)


def check_pictures(pictures: Sequence[Tensor], patch: int) -> None:
    """Check that pictures have equal channels, and hold a patch.

    Raises:
        InvalidArgumentError: One has not, or does not.
    """
    channels = {picture.shape[0] for picture in pictures}
    if len(channels) > 1:
        raise InvalidArgumentError(
            "pictures", "all grey or all RGB", f"{sorted(channels)} channels"
        )
    for picture in pictures:
        height, width = picture.shape[1:]
        if min(height, width) < patch:
            expected = f"sides of at least {patch} pixels, the patch"
            raise InvalidArgumentError("pictures", expected, f"{height} x {width}")
