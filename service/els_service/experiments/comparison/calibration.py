"""Windows by noise level for which a machine's score is closest to a network's.

Along the network's own trajectories (Kamb & Ganguli, ICML 2025, appendix): at each level the median
over samples of the window whose score has the largest cosine with the network's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from els_service.denoisers.base import Denoiser, make_query
from els_service.denoisers.files import write_atomically
from els_service.denoisers.levels import Floats, NoiseLevel
from els_service.denoisers.noise import seeded_noise
from els_service.denoisers.samplers import Options, sample
from els_service.denoisers.windows import WindowTable
from els_service.errors import ElsError, LoadError
from els_service.experiments.comparison.sampling import SampleSpec

SEARCHES = ("all", "climb")


@dataclass(frozen=True, eq=False)
class Point:
    """States of the trajectories of all samples at one level."""

    level: NoiseLevel
    """Level of length 1, shared by all samples."""
    x: Tensor
    """[N, C, H, W] float32"""
    pull: Tensor
    """a·D(x) - x of the network, [N, C, H, W] float64: its score up to a factor."""


@dataclass(frozen=True)
class Calibration:
    """Result: a window for each level, and all cosines computed."""

    sigma: tuple[float, ...]
    k: tuple[int, ...]
    cosines: tuple[Mapping[int, Floats], ...]
    """For each level: window → cosine of each sample, [N]."""

    @property
    def table(self) -> WindowTable:
        """The windows by noise level."""
        return WindowTable(self.sigma, self.k)


def trajectory(network: Denoiser, how: SampleSpec, count: int) -> list[Point]:
    """Return the states of the network's trajectories, from the lowest level up.

    Raises:
        ElsError: The network's answer is not finite.
    """
    options = Options(steps=how.steps)
    x = seeded_noise(how.seed, count, network.info.shape)(0)
    labels = how.labels(0, count)
    points = []
    for step in sample(network, count=count, seed=how.seed, options=options, labels=labels):
        level = options.level(how.steps - step.index + 1)
        if not step.denoised.isfinite().all():
            raise ElsError(f"network: expected finite images, got others at s/a = {level.sigma[0]}")
        points.append(Point(level, x.float(), _pull(step.denoised, x, level)))
        x = step.x
    return points[::-1]


def _pull(denoised: Tensor, x: Tensor, level: NoiseLevel) -> Tensor:
    return float(level.a[0]) * denoised.double() - x.double()


def cosine(machine: Denoiser, point: Point, window: int, labels: Sequence[int]) -> Floats:
    """Return the cosine between the scores of a machine and of the network, [N]."""
    query = make_query(point.x, point.level, labels, window)
    machine.check(query)
    ours = _pull(torch.from_numpy(machine.denoise(query).pixels), point.x, point.level)
    cosines: Floats = torch.cosine_similarity(
        ours.flatten(1), point.pull.flatten(1), eps=1e-300
    ).numpy()
    return cosines


@dataclass(eq=False)
class Journal:
    """Computed cosines, saved to a file so that an interrupted run can be resumed.

    Raises:
        LoadError: The file is of another run; names the setting that differs.
    """

    file: Path
    settings: Mapping[str, Any]
    cosines: dict[str, list[float]] = field(default_factory=dict)
    """LEVEL/WINDOW → cosine of each sample."""

    def __post_init__(self) -> None:
        if not self.file.exists():
            return
        try:
            content = json.loads(self.file.read_bytes())
            found, self.cosines = content["settings"], content["cosines"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LoadError(self.file, f"expected a calibration's journal: {error}") from error
        requested = json.loads(json.dumps(self.settings))
        for name in sorted(found.keys() | requested.keys()):
            if found.get(name) != requested.get(name):
                reason = f"{name}: expected {found.get(name)} as begun, got {requested.get(name)}"
                raise LoadError(self.file, f"{reason}; remove the file to start over")

    def once(self, key: str, compute: Callable[[], Floats]) -> Floats:
        """Return the value of a key, computed and saved if missing."""
        if key not in self.cosines:
            self.cosines[key] = compute().tolist()
            content = {"settings": self.settings, "cosines": self.cosines}
            write_atomically(self.file, json.dumps(content).encode())
        return np.array(self.cosines[key])


def calibrate(
    machine: Denoiser,
    points: Sequence[Point],
    labels: Sequence[int],
    windows: Sequence[int],
    journal: Journal,
    *,
    search: str = "all",
    report: Callable[[int, int], None] = lambda level, window: None,
) -> Calibration:
    """Return for each level the upper median of the samples' best windows.

    Args:
        machine: machine with a window.
        points: states of the trajectories, from the lowest level up.
        labels: labels of the samples, -1 for none.
        windows: candidates, increasing.
        journal: saves the computed cosines.
        search: ``all`` candidates; or ``climb``: hill climbing from the window of the level
            below by the median cosine, at about a third of the cost.
        report: callback with level (from 1) and window of the next computation.
    """
    table: list[Mapping[int, Floats]] = []
    chosen: list[int] = []
    for i, point in enumerate(points, 1):
        row = _Row(machine, point, labels, journal, i, report)
        if search == "all":
            for k in windows:
                row.median(k)
        else:
            _climb(row.median, windows, chosen[-1] if chosen else windows[0])
        table.append({k: row.cosines[k] for k in sorted(row.cosines)})
        chosen.append(_median_best(table[-1]))
    sigma = tuple(float(point.level.sigma[0]) for point in points)
    return Calibration(sigma, tuple(chosen), tuple(table))


@dataclass(eq=False)
class _Row:
    """The cosines of one level, computed on demand."""

    machine: Denoiser
    point: Point
    labels: Sequence[int]
    journal: Journal
    level: int
    report: Callable[[int, int], None]
    cosines: dict[int, Floats] = field(default_factory=dict)

    def median(self, window: int) -> float:
        if window not in self.cosines:
            self.report(self.level, window)
            self.cosines[window] = self.journal.once(
                f"{self.level}/{window}",
                lambda: cosine(self.machine, self.point, window, self.labels),
            )
        return float(np.median(self.cosines[window]))


def _climb(height: Callable[[int], float], windows: Sequence[int], start: int) -> None:
    """Evaluate ``height`` until no neighbour of the best window is higher."""
    here = windows.index(start)
    while True:
        neighbours = windows[max(0, here - 1) : here + 2]
        higher = max(neighbours, key=height)
        # Ties keep the current window, so that two equal ones do not alternate for ever.
        if height(higher) <= height(windows[here]):
            return
        here = windows.index(higher)


def best_by_label(calibration: Calibration, labels: Sequence[int]) -> dict[int, list[int]]:
    """Return for each label the windows chosen by its samples only."""
    return {
        label: [_median_best(row, np.array(labels) == label) for row in calibration.cosines]
        for label in sorted(set(labels))
    }


def _median_best(
    row: Mapping[int, Floats], samples: npt.NDArray[np.bool_] | slice = slice(None)
) -> int:
    """Return the upper median of each sample's best window; the smallest of equal ones."""
    windows = np.array(list(row))
    cosines = np.stack(list(row.values()))[:, samples]
    best = np.sort(windows[cosines.argmax(0)])
    return int(best[len(best) // 2])
