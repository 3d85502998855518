"""How original an image is: measures of memorisation against a bank.

Distances are Euclidean over all pixels of [−1, 1]. Sources are those of an explanation of the image
itself at a low noise level, whatever model drew it. Terms and thresholds:

- gap ratio: Gu et al., "On Memorization in Diffusion Models", TMLR 2025; memorised below 1/3;
- Carlini ratio: Carlini et al., "Extracting Training Data from Diffusion Models", USENIX Security
  2023, with tiled distances; eidetic below 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from els_kernels import checkpoint
from els_service.denoisers.banks import pixels_from
from els_service.denoisers.base import Denoised, DenoiserInfo, Query
from els_service.denoisers.source_banks import SourceBank
from els_service.denoisers.source_measures import (
    CONCENTRATION,
    agreeing,
    largest_region,
    seams,
    sources_of,
)

NEIGHBOURS = 50
"""n of the Carlini ratio, and the most nearest images of a report."""
ALPHA = 0.5
"""α of the Carlini ratio."""
DEFAULT_SIGMA = 0.1
"""Noise level of the explanation of a report, about that of the last of 20 steps of a sample."""
DEFAULT_WINDOW = 13
"""Window of that explanation, for machines with windows: so large that few patches of a bank are
equal, and as large as in the middle of a sample. Smaller ones take longer."""
_GRID = 4
"""Tiles of each axis."""
_BLOCK_BYTES = 1 << 20
"""Of the bank images in float32 that are compared at once, so that they stay in the cache."""
GAP_IMAGES, CARLINI_IMAGES = 2, NEIGHBOURS + 1
"""Least images of a bank for the gap ratio and the Carlini ratio."""

_SOURCE_MEASURES = (
    *("largest_share", "sources_of_90", "seams", "clear"),
    *("largest_region", "in_place"),
)
MEASURES = ("gap_ratio", "carlini_ratio", *_SOURCE_MEASURES)


@dataclass(frozen=True, eq=False)
class Report:
    """Measures of one image; None where ``absent`` has the reason.

    Attributes:
        nearest: int64 [n], bank images by rising distance, n = ``NEIGHBOURS`` or all there are.
        distances: float32 [n], of these.
        gap_ratio: distance of the nearest image over that of the second nearest; 0 if the first is.
        carlini_ratio: tiled distance of the nearest image over ``ALPHA`` times the mean of the
            ``NEIGHBOURS`` nearest, by that distance.
        largest_share: largest share of one bank image in the sources of all pixels.
        largest_image: that bank image; −1 without sources.
        sources_of_90: least number of bank images that make 90 % of the sources.
        seams: share of the pairs of neighbouring clear pixels whose sources do not continue one
            another: another bank image or displacement.
        clear: share of pixels with few sources, see ``source_measures.sources_of``.
        largest_region: share of the pixels in the largest connected region that continues one bank
            image at one displacement.
        in_place: share of the pixels with a source at their own place.
        absent: measure → reason why there is none.
    """

    nearest: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float32]
    gap_ratio: float | None = None
    carlini_ratio: float | None = None
    largest_share: float | None = None
    largest_image: int = -1
    sources_of_90: int | None = None
    seams: float | None = None
    clear: float | None = None
    largest_region: float | None = None
    in_place: float | None = None
    absent: dict[str, str] = field(default_factory=dict)


@dataclass(eq=False, slots=True)  # immutable by convention; see base.Condition
class Originality(Denoised):
    """Reports of images, and their bank."""

    reports: list[Report]
    bank: SourceBank

    def __getitem__(self, images: slice) -> Originality:
        return Originality(self.pixels[images], None, self.reports[images], self.bank)


@runtime_checkable
class HasBank(Protocol):
    """A denoiser of a bank."""

    @property
    def info(self) -> DenoiserInfo:
        """Description of the denoiser."""
        ...

    @property
    def bank(self) -> SourceBank:
        """Images of the denoiser."""
        ...

    def check(self, query: Query) -> None:
        """Raise InvalidArgumentError if the query is rejected; cheap."""
        ...


def report(
    image: npt.NDArray[np.float32],
    bank: SourceBank,
    sources: npt.NDArray[np.int64] | None = None,
    weights: npt.NDArray[np.float32] | None = None,
    shares: npt.NDArray[np.float64] | None = None,
    *,
    wraps: bool = False,
) -> Report:
    """Return the measures of one image against a bank.

    Args:
        image: [C, H, W].
        bank: the images it may be copied from.
        sources: [H, W, m, 3] of its explanation; None, with the next two, for none.
        weights: [H, W, m].
        shares: [N].
        wraps: whether images continue at the opposite border.
    """
    absent: dict[str, str] = {}
    gap: float | None = None
    carlini: float | None = None
    same, every, tiled = distances_to(image, bank)
    order = np.argsort(every, kind="stable")[:NEIGHBOURS]
    nearest, distances = same[order], every[order]
    if len(same):
        gap = gap_ratio(every)
        carlini = carlini_ratio(tiled)
    ratios = (("gap_ratio", gap, GAP_IMAGES), ("carlini_ratio", carlini, CARLINI_IMAGES))
    for name, ratio, least in ratios:
        if not len(same):
            absent[name] = f"needs a bank of images of its size, {_sides(image.shape)}"
        elif ratio is None:
            of_size = "" if len(same) == len(bank) else " of its size"
            needs = f"needs a bank of at least {least} images{of_size}"
            absent[name] = f"{needs}, this has {len(same)}"
    if sources is None or weights is None or shares is None:
        absent |= dict.fromkeys(_SOURCE_MEASURES, "needs a model with sources")
        return Report(nearest, distances, gap, carlini, absent=absent)
    found = sources_of(sources, weights, wraps=wraps, extents=bank.extents)
    seam = seams(found)
    if seam is None:
        absent["seams"] = "needs two neighbouring pixels with few sources"
    return Report(
        nearest,
        distances,
        gap,
        carlini,
        largest_share=float(shares.max()),
        largest_image=int(shares.argmax()),
        sources_of_90=sources_of_90(shares),
        seams=seam,
        clear=float(found.clear.mean()),
        largest_region=largest_region(found),
        in_place=float(agreeing(found, 0, 0).mean()),
        absent=absent,
    )


def distances_to(
    image: npt.NDArray[np.float32], bank: SourceBank
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the images of a bank that have the shape of an image, and its distances from them.

    The tiled distance is the largest distance of two tiles at the same place of a 4 × 4 grid.
    Differences are squared, never expanded: near copies keep their precision.

    Args:
        image: [C, H, W].
        bank: the images.

    Returns:
        Numbers of these images in the bank, and the distances from them, whole and tiled; [n] each.
    """
    numbers: list[npt.NDArray[np.int64]] = []
    squares: list[npt.NDArray[np.float32]] = []
    first = 0
    for group in bank.groups:
        if group.shape[1:] == image.shape:
            numbers.append(np.arange(first, first + len(group)))
            squares.append(_tile_squares(image, group))
        first += len(group)
    if not numbers:
        return np.empty(0, np.int64), *np.empty((2, 0), np.float32)
    found = np.concatenate(squares)
    return np.concatenate(numbers), np.sqrt(found.sum(1)), np.sqrt(found.max(1))


def _tile_squares(
    image: npt.NDArray[np.float32], group: npt.NDArray[Any]
) -> npt.NDArray[np.float32]:
    """Return the squared distances of each tile from those of stored images, [n, tiles]."""
    flat, tiles = image.reshape(-1), torch.from_numpy(_tiles(image.shape))
    squares = np.empty((len(group), tiles.shape[1]), np.float32)
    step = max(1, _BLOCK_BYTES // (4 * len(flat)))
    for first in range(0, len(squares), step):
        checkpoint()
        block = pixels_from(group[first : first + step]).reshape(-1, len(flat))
        block -= flat
        block *= block
        # By torch: the threads of numpy's BLAS are others, which wait by spinning.
        squares[first : first + step] = (torch.from_numpy(block) @ tiles).numpy()
    return squares


def gap_ratio(distances: npt.NDArray[np.float32]) -> float | None:
    """Return d₁/d₂ of the distances from all bank images [N]; None for fewer than two."""
    if len(distances) < GAP_IMAGES:
        return None
    first, second = np.partition(distances, 1)[:2].tolist()
    return first / second if first else 0.0


def carlini_ratio(distances: npt.NDArray[np.float32]) -> float | None:
    """Return d₁/(α·mean of the n smallest) of [N]; None if there are no more than n = 50."""
    if len(distances) < CARLINI_IMAGES:
        return None
    smallest = np.partition(distances, NEIGHBOURS)[:NEIGHBOURS].astype(np.float64)
    mean = float(smallest.mean())
    return float(smallest.min()) / (ALPHA * mean) if mean else 0.0


def sources_of_90(shares: npt.NDArray[np.float64]) -> int:
    """Return the least number of bank images whose shares [N] make 90 % of their sum."""
    rising = np.cumsum(np.sort(shares)[::-1])
    # Rounding must not ask for one image more where shares make 90 % exactly.
    return int(np.searchsorted(rising, (CONCENTRATION - 1e-9) * rising[-1])) + 1


def _tiles(shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Return [C·H·W, tiles]: 1 where a pixel is in a tile."""
    _, height, width = shape
    row, column = (
        np.repeat(np.arange(count), np.diff(np.linspace(0, side, count + 1).round().astype(int)))
        for side, count in ((height, min(_GRID, height)), (width, min(_GRID, width)))
    )
    count = int(column[-1]) + 1
    numbers = np.broadcast_to(row[:, None] * count + column, shape).reshape(-1)
    tiles: npt.NDArray[np.float32] = (numbers[:, None] == np.arange(numbers.max() + 1)).astype(
        np.float32
    )
    return tiles


def _sides(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
