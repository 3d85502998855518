"""Windows of a bank chosen without a network: by the leave-one-out denoising error of its images.

At level σ the error of window k is E‖D_k(φ_m + σ·ε) - φ_m‖² a pixel, where D_k is the machine over
the bank *without* image m: a small window averages patches that do not belong together, a large one
finds no similar patch. It is estimated at random pixels of random images, with one noise ε for all
levels and windows, so that windows are compared on equal queries; at each pixel it is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from els_kernels import Geometry, max_window
from els_kernels.held_out import Cell, HeldOut, leave_one_out
from els_service.denoisers.banks import UNLABELLED, Bank
from els_service.denoisers.levels import Floats, cosine
from els_service.denoisers.windows import WindowTable
from els_service.errors import InvalidArgumentError

TIMES = (0.05, *(i / 10 for i in range(1, 11)))
"""Times of the cosine schedule whose levels a table has by default."""
_DENSE, _LARGEST = 17, 33
"""Default candidates: every odd window up to the first, then every second one up to the other."""
_CHEAP = 1e9
"""Pairs of query, place and cell up to which every window is tried at every level."""
_PILOT = 16
"""The pilot that brackets the windows uses a part of the bank: one in so many images."""
_BUDGET = 8e12
"""Operations of the pass over the bank that a part of a large one is chosen for: on two cores with
AVX-512 about five minutes."""
_CELL, _BRACKET = 340, 4
"""Operations of a cell for each query and place, by its measured time, and cells of a level."""

_FEWEST = 64
"""Fewest images of a part of a bank that has so many."""

Report = Callable[[str, int, int], None]
"""Callback with the name of a pass over the bank, the work done and its total."""


@dataclass(frozen=True)
class Sampling:
    """Which queries estimate the errors.

    Attributes:
        count: number of random pixels, on different images as far as the bank has them.
        seed: of images, pixels and noise.
        by_label: whether an image is denoised by the images of its own label alone, as in a
            request that names it.
    """

    count: int = 96
    seed: int = 0
    by_label: bool = False


@dataclass(frozen=True, eq=False)
class Errors:
    """Squared errors of the queries, mean over channels, in units of images in [-1, 1]."""

    images: torch.Tensor
    """Bank image of each query, [Q]."""
    cells: Mapping[Cell, Floats]
    """(σ, window) → squared error of each query, [Q]."""

    def mean(self, cell: Cell) -> tuple[float, float]:
        """Return the mean error of a cell and its standard error."""
        return self._estimate(self.cells[cell])

    def difference(self, cell: Cell, other: Cell) -> tuple[float, float]:
        """Return the mean of error minus other error on equal queries, and its standard error."""
        return self._estimate(self.cells[cell] - self.cells[other])

    def windows(self, sigma: float) -> list[int]:
        """Return the windows tried at a level, increasing."""
        return sorted(k for level, k in self.cells if level == sigma)

    def best(self, sigma: float) -> int:
        """Return the window of least mean error; the smallest of equal ones."""
        return min(self.windows(sigma), key=lambda k: self.mean((sigma, k))[0])

    def _estimate(self, values: Floats) -> tuple[float, float]:
        # Queries of one image are not independent: deviations are summed by image first.
        sums = np.bincount(self.images.numpy(), values - values.mean())
        return float(values.mean()), float(np.sqrt((sums**2).sum()) / len(values))


@dataclass(frozen=True, eq=False)
class Chosen:
    """Result: the window of each level, and the errors of every window tried."""

    table: WindowTable
    errors: Errors
    images: int
    """Images of the bank, of which one is left out at a time."""


def default_levels() -> tuple[float, ...]:
    """Return σ at ``TIMES``, to six digits."""
    return tuple(float(f"{sigma:.6g}") for sigma in cosine(np.array(TIMES)).sigma)


def default_windows_to_try(bank: Bank, geometry: Geometry) -> tuple[int, ...]:
    """Return odd windows up to the image's smaller side, at most 33, sparser above 17."""
    height, width = bank.shape[1:]
    largest = min(max_window(geometry, height, width), min(height, width), _LARGEST)
    dense = range(1, min(largest, _DENSE) + 1, 2)
    return (*dense, *range(_DENSE + 4, largest + 1, 4))


def draw(bank: Bank, how: Sampling) -> HeldOut:
    """Return random pixels of random images with their noise.

    Raises:
        InvalidArgumentError: The bank, or every label of it, has a single image.
    """
    numbers = np.random.default_rng(how.seed)
    labels = bank.labels if how.by_label else np.full(len(bank.labels), UNLABELLED)
    ranges = {int(label): bank.label_range(int(label)) for label in np.unique(labels)}
    usable = [m for m, label in enumerate(labels) if np.diff(ranges[int(label)])[0] > 1]
    if not usable:
        raise InvalidArgumentError("bank", "at least 2 images to leave one out", len(labels))
    order = numbers.permutation(usable)
    images = np.resize(order, how.count)
    channels, height, width = bank.shape
    noise = numbers.standard_normal((how.count, channels, height, width), np.float32)
    return HeldOut(
        torch.from_numpy(images),
        torch.from_numpy(numbers.integers(0, height, how.count)),
        torch.from_numpy(numbers.integers(0, width, how.count)),
        torch.from_numpy(noise),
        [ranges[int(labels[m])] for m in images],
    )


def held_out_errors(
    bank: Bank,
    geometry: Geometry,
    cells: Sequence[Cell],
    how: Sampling,
    *,
    device: str = "cpu",
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Errors:
    """Return the leave-one-out errors of cells.

    Args:
        bank: images; each query's own image is left out of it.
        geometry: of the machine, with a window.
        cells: noise levels and windows.
        how: which queries.
        device: where to compute.
        report: callback with the work done and its total.

    Raises:
        InvalidArgumentError: The bank has too few images.
        ValueError: A window or level is invalid.
    """
    held, pixels = draw(bank, how), bank.pixels()
    truth = pixels[held.images, :, held.rows, held.cols].double()
    on_device = HeldOut(held.images, held.rows, held.cols, held.noise.to(device), held.ranges)
    means = leave_one_out(pixels.to(device), on_device, cells, geometry, report)
    errors = {cell: (mean - truth).square().mean(1).numpy() for cell, mean in means.items()}
    return Errors(held.images, errors)


def choose_windows(
    bank: Bank,
    geometry: Geometry,
    *,
    how: Sampling,
    levels: Sequence[float] | None = None,
    windows: Sequence[int] | None = None,
    also: WindowTable | None = None,
    device: str = "cpu",
    report: Report = lambda name, done, total: None,
) -> Chosen:
    """Return for each level the window of least leave-one-out error.

    On a small bank every window is tried. On a large one a pilot on a part of the bank brackets
    the windows, and the whole bank decides: the bracket grows until the best window has a worse
    one on each side.

    Args:
        bank: images.
        geometry: of the machine, with a window.
        how: which queries.
        levels: σ of the table, increasing; ``default_levels`` if None.
        windows: candidates, increasing; ``default_windows_to_try`` if None.
        also: table whose windows are tried at every level as well, for comparison.
        device: where to compute.
        report: receives progress.

    Raises:
        InvalidArgumentError: The bank has too few images, or a window is not possible.
    """
    levels = default_levels() if levels is None else levels
    windows = default_windows_to_try(bank, geometry) if windows is None else windows
    _check_windows(windows, max_window(geometry, *bank.shape[1:]))
    extra = set() if also is None else {(s, int(also.at(np.array([s]))[0])) for s in levels}
    every = {(sigma, k) for sigma in levels for k in windows}

    def errors(part: Bank, cells: Iterable[Cell], name: str) -> Errors:
        wanted = sorted(cells)
        return held_out_errors(
            part,
            geometry,
            wanted,
            how,
            device=device,
            report=lambda done, total: report(name, done, total),
        )

    if _pairs(bank, geometry, how, len(every)) <= _CHEAP:
        found = errors(bank, every | extra, "all windows")
    else:
        pilot = errors(part_of(bank, _PILOT), every, "pilot")
        bracket = {
            (sigma, k) for sigma in levels for k in _around(windows, pilot.best(sigma), 1, 2)
        }
        found = errors(bank, bracket | extra, "whole bank")
        while missing := _missing(found, levels, windows):
            more = errors(bank, missing, "neighbours")
            found = Errors(found.images, {**found.cells, **more.cells})
    table = WindowTable(tuple(levels), tuple(map(found.best, levels)))
    return Chosen(table, found, len(bank.images))


def _check_windows(windows: Sequence[int], largest: int) -> None:
    for k in windows:
        if k % 2 == 0 or not 1 <= k <= largest:
            raise InvalidArgumentError("windows", f"odd numbers from 1 to {largest}", k)


def _pairs(bank: Bank, geometry: Geometry, how: Sampling, cells: int) -> float:
    places = 1 if geometry.sources == "same" else bank.shape[1] * bank.shape[2]
    labels = max(1, bank.label_count) if how.by_label else 1
    return how.count * places * len(bank.images) / labels * cells


def affordable(
    bank: Bank, geometry: Geometry, how: Sampling, windows: Sequence[int] | None = None
) -> int:
    """Return how many images of a bank ``choose_windows`` can use in some minutes on two cores.

    Depends on sizes alone, so that the same bank always has the same windows. At 96 queries the
    error of the estimate is larger than what more images change: on Fashion-MNIST the windows of
    1,000 and of 5,000 images differed by less than one standard error at every level.
    """
    windows = default_windows_to_try(bank, geometry) if windows is None else windows
    products = 4 * bank.shape[0] * max(windows) ** 2
    cells = _CELL * len(TIMES) * min(len(windows), _BRACKET)
    each = _pairs(bank, geometry, how, products + cells) / len(bank.images)
    return min(len(bank.images), max(_FEWEST, int(_BUDGET / each)))


def part_of(bank: Bank, share: int) -> Bank:
    """Return one in ``share`` images, at least ``_FEWEST`` and 2 of each label."""
    kept: list[int] = []
    for label in np.unique(bank.labels):
        lo, hi = np.searchsorted(bank.labels, [label, label + 1])
        least = max(2, _FEWEST // max(1, bank.label_count))
        kept += range(lo, hi, max(1, min(share, (hi - lo) // least)))
    return Bank(bank.images[kept], bank.labels[kept])


def _around(windows: Sequence[int], k: int, below: int, above: int) -> Sequence[int]:
    i = list(windows).index(k)
    return windows[max(0, i - below) : i + above + 1]


def _missing(found: Errors, levels: Sequence[float], windows: Sequence[int]) -> set[Cell]:
    """Return the neighbours of each level's best window that were not tried."""
    wanted = set()
    for sigma in levels:
        best = found.best(sigma)
        # A window for comparison may lie between two candidates.
        near = [max((k for k in windows if k < best), default=best)]
        near.append(min((k for k in windows if k > best), default=best))
        wanted |= {(sigma, k) for k in near} - found.cells.keys()
    return wanted
