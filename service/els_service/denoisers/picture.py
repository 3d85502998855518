"""The denoiser of pictures: the ELS machine whose bank is the patches of a few pictures.

Its labels are the scales of a pyramid, so that the pictures of one scale answer a query.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from els_kernels import (
    FOLD_GEOMETRIES,
    FoldedAttention,
    FoldedMoments,
    PosteriorStatistics,
    count_fold_work,
)
from els_service.denoisers.analytic import bank_bytes, bank_info
from els_service.denoisers.base import Denoised, DenoiserInfo, Integers, Query, SizeRange
from els_service.denoisers.explanations import Explanation, explanation
from els_service.denoisers.folded import (
    LogitSeconds,
    explain_seconds,
    fold_product,
    logit_seconds,
    product_seconds,
)
from els_service.denoisers.gradients import Direction, Product
from els_service.denoisers.levels import MAX_SIGMA
from els_service.denoisers.picture_banks import PictureBank
from els_service.denoisers.pyramids import Size
from els_service.denoisers.query_checks import check_query
from els_service.denoisers.windows import WindowTable

MAX_PICTURE_SIDE = 1024
"""Largest height and width of queries, without the border of a tileable picture."""
_GEOMETRY = FOLD_GEOMETRIES["els", "inside"]
_UNIFORM = MAX_SIGMA * (1 - 1e-9)
"""Lowest s/a at which the posterior is uniform."""
_IMAGE_S = 4e-3
"""Seconds of a query image beside its logits (measured)."""
_LARGE = {"native": 0.45}
"""Seconds of a logit in rows of pictures, relative to the short rows of a bank (measured)."""


class FoldOfPictures:
    """Fold of images of every scale, with variance and Jacobian products.

    Args:
        attention: the fold.
        ranges: scale, or -1 for all → range of its images.
        patch: side of a patch.
        fold: ρ.
    """

    def __init__(
        self,
        attention: FoldedAttention,
        ranges: Callable[[int], tuple[int, int]],
        *,
        patch: int,
        fold: float,
    ) -> None:
        self._attention, self._moments = attention, FoldedMoments(attention)
        self._ranges, self._patch, self._fold = ranges, patch, fold

    def warm_up(self) -> None:
        """Compile what queries with the patch need; see ``base.Compiling``."""
        self._attention.warm_up([self._patch], _GEOMETRY)
        self._moments.warm_up([self._patch], _GEOMETRY)

    def _attend(self, query: Query, images: Integers) -> npt.NDArray[np.float32]:
        """Return D of some images of a query, [n, C, H, W]."""
        arguments = {
            name: value if name == "geometry" else value[images]
            for name, value in self._arguments(query).items()
        }
        x = query.x[torch.from_numpy(images)].to(self._attention.device)
        means: npt.NDArray[np.float32] = self._attention(x, **arguments).mean.cpu().numpy()
        return means

    def _statistics(self, query: Query, top: int, *, shares: bool = True) -> PosteriorStatistics:
        x = query.x.to(self._attention.device)
        return self._moments.statistics(x, **self._arguments(query), top=top, shares=shares)

    def variance(self, query: Query) -> npt.NDArray[np.float32]:
        """Return the posterior variance of each pixel, [B, C, H, W]."""
        found = self._statistics(query, 1, shares=False)
        variance: npt.NDArray[np.float32] = found.variance.cpu().numpy()
        return variance

    def vjp(self, query: Query, cotangent: npt.NDArray[np.float32]) -> Product:
        """Return D(x) and Jᵀg, exactly."""
        return fold_product(self._moments, "vjp", query, cotangent, self._arguments(query))

    def jvp(self, query: Query, tangent: npt.NDArray[np.float32]) -> Product:
        """Return D(x) and J u, exactly."""
        return fold_product(self._moments, "jvp", query, tangent, self._arguments(query))

    def _arguments(self, query: Query) -> dict[str, Any]:
        """Return the arguments of the fold other than x."""
        return {
            "a": torch.tensor(query.level.a),
            "s": torch.tensor(query.level.s),
            "window": torch.full((len(query),), self._patch),
            "fold": torch.full((len(query),), self._fold, dtype=torch.float64),
            "ranges": torch.tensor([self._ranges(label) for label in query.labels.tolist()]),
            "geometry": _GEOMETRY,
        }

    def _attended(self, query: Query) -> Integers:
        """Return the images whose posterior is not uniform."""
        return np.flatnonzero(query.level.sigma < _UNIFORM)


class PictureDenoiser(FoldOfPictures):
    """The ELS machine of a few pictures, with patches wholly inside, for queries of any size.

    At the highest level, σ = 1e6, the posterior is uniform over all patches: D is the fold of their
    mean.

    A source is a pixel of a picture at the scale of the query's label, not of the whole picture:
    image ``scale · pictures + picture``, with row and column at that scale.

    Args:
        attention: fold of ``bank.groups``.
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
        super().__init__(attention, bank.label_range, patch=patch, fold=fold)
        self._bank = bank
        self._uniform: dict[int, Tensor] = {}
        """Scale → mean patch, [C, P, P] float64."""
        sides = (patch, MAX_PICTURE_SIDE + 2 * (patch - 1))
        self._info = DenoiserInfo(
            kind="picture",
            shape=bank.shape,
            machine="els",
            padding="inside",
            window=WindowTable.constant(patch),
            fold=fold,
            sizes=SizeRange(sides, sides),
            scales=bank.sizes,
            scale_steps=steps,
            patch=patch,
            label_count=bank.label_count,
            label_names=bank.label_names,
            bank=replace(bank_info(bank), images=bank.pictures),
            has_gradients=True,
            has_sources=True,
            has_originality=True,
            implementation=attention.implementation,
            # The fold holds the pixels of the bank, and no copy.
            memory_bytes=bank_bytes(bank, copies=0),
        )

    @property
    def info(self) -> DenoiserInfo:
        """Description of the denoiser."""
        return self._info

    @property
    def bank(self) -> PictureBank:
        """The pictures at every scale."""
        return self._bank

    def check(self, query: Query) -> None:
        """Raise InvalidArgumentError if the shape or a label is not supported."""
        check_query(self._info, query)

    def predict_seconds(self, query: Query) -> float:
        """Return a rough estimate from the number of logits and the number of torch's threads."""
        attended = self._attended(query).tolist()
        return self._seconds(query, attended, logit_seconds, self._info.implementation)

    def predict_explain_seconds(self, query: Query) -> float:
        """Return a rough estimate from the number of logits."""
        kind = self._moments.implementation
        return self._seconds(query, range(len(query)), explain_seconds, kind)

    def predict_product_seconds(self, query: Query, direction: Direction) -> float:
        """Return a rough estimate from the number of logits."""
        kind = self._moments.implementation
        return self._seconds(query, range(len(query)), product_seconds, kind)

    def _seconds(
        self, query: Query, images: Sequence[int], each: LogitSeconds, implementation: str
    ) -> float:
        size = query.pixels.shape[2], query.pixels.shape[3]
        taps = 1 if math.isinf(self._fold) else self._patch
        work = sum(
            count_fold_work(_GEOMETRY, size, (image.shape[1], image.shape[2]), self._patch)
            for index in images
            for image in self._bank.images[slice(*self._bank.label_range(int(query.labels[index])))]
        )
        logit = each(implementation, self._info.shape[0], taps) * _LARGE.get(implementation, 1.0)
        return len(query) * _IMAGE_S + logit * work / torch.get_num_threads()

    def explain(self, query: Query, top: int) -> Explanation:
        """Return the statistics with the ``top`` sources of every pixel.

        Unlike ``denoise``, that of a uniform posterior is computed like any other.
        """
        return explanation(self._statistics(query, top), self._bank)

    def denoise(self, query: Query) -> Denoised:
        """Return posterior means, without evidence."""
        attended = self._attended(query)
        means = np.empty_like(query.pixels)
        if len(attended):
            means[attended] = self._attend(query, attended)
        for index in sorted(set(range(len(query))) - set(attended.tolist())):
            size = query.pixels.shape[2], query.pixels.shape[3]
            means[index] = self._mean_everywhere(int(query.labels[index]), size).numpy()
        return Denoised(means, None)

    def _mean_everywhere(self, label: int, size: Size) -> Tensor:
        """Return D [C, H, W] float32 of the uniform posterior: the fold of one mean patch."""
        if label not in self._uniform:
            self._uniform[label] = mean_patch(
                self._bank.images[slice(*self._bank.label_range(label))], self._patch
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
