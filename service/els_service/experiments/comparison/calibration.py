"""Windows by noise level with which a machine's score is most like a network's.

Along the network's own trajectories (Kamb & Ganguli, ICML 2025, appendix): at each level, for each
sample, the window whose score has the largest cosine with the network's; of these the median.
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
from els_service.experiments.comparison.drawing import SampleSpec

SEARCHES = ("all", "climb")


@dataclass(frozen=True, eq=False)
class Point:
    """Where the trajectories of all samples stand at one level."""

    level: NoiseLevel
    """Of one image, for all."""
    x: Tensor
    """[N, C, H, W] float32"""
    pull: Tensor
    """a·D(x) - x of the network, [N, C, H, W] float64: its score but for a factor."""


@dataclass(frozen=True)
class Calibration:
    """The result: a window for each level, and every cosine that was computed."""

    sigma: tuple[float, ...]
    k: tuple[int, ...]
    cosines: tuple[Mapping[int, Floats], ...]
    """Of each level: window → cosine of each sample, [N]."""

    @property
    def table(self) -> WindowTable:
        """The windows by noise level."""
        return WindowTable(self.sigma, self.k)


def trajectory(network: Denoiser, how: SampleSpec, count: int) -> list[Point]:
    """Return where the network's samples pass, from the lowest level up.

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
    ours = _pull(machine.denoise(query).mean, point.x, point.level)
    cosines: Floats = torch.cosine_similarity(
        ours.flatten(1), point.pull.flatten(1), eps=1e-300
    ).numpy()
    return cosines


@dataclass(eq=False)
class Journal:
    """Cosines that were computed, kept in a file so that a run that was killed goes on.

    Raises:
        LoadError: The file is of another run; says of which setting.
    """

    file: Path
    settings: Mapping[str, Any]
    cosines: dict[str, list[float]] = field(default_factory=dict)
    """LEVEL/WINDOW → of each sample."""

    def __post_init__(self) -> None:
        if not self.file.exists():
            return
        try:
            content = json.loads(self.file.read_bytes())
            found, self.cosines = content["settings"], content["cosines"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LoadError(self.file, f"expected a calibration's journal: {error}") from error
        asked = json.loads(json.dumps(self.settings))
        for name in sorted(found.keys() | asked.keys()):
            if found.get(name) != asked.get(name):
                reason = f"{name}: expected {found.get(name)} as begun, got {asked.get(name)}"
                raise LoadError(self.file, f"{reason}; remove the file to begin anew")

    def once(self, key: str, compute: Callable[[], Floats]) -> Floats:
        """Return what is kept under a key, computed if it is not there."""
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
    """Return for each level the upper median of the windows that are the samples' best.

    Args:
        machine: with a window.
        points: from the lowest level up.
        labels: of the samples, -1 for none: whose images of the bank may answer.
        windows: candidates, increasing.
        journal: keeps what is done.
        search: ``all`` candidates; or ``climb``: from the one of the level below, its neighbours
            as long as the median cosine grows, at about a third of the cost.
        report: told level (from 1) and window of what is computed next.
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
    """The cosines of one level, computed when they are asked for."""

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
    """Ask for heights until a window's neighbours are known not to be higher."""
    here = windows.index(start)
    while True:
        beside = windows[max(0, here - 1) : here + 2]
        higher = max(beside, key=height)
        # Of equals the one that is held: else two could hand over to each other for ever.
        if height(higher) <= height(windows[here]):
            return
        here = windows.index(higher)


def best_by_label(calibration: Calibration, labels: Sequence[int]) -> dict[int, list[int]]:
    """Return for each label the windows that its samples alone would have chosen."""
    return {
        label: [_median_best(row, np.array(labels) == label) for row in calibration.cosines]
        for label in sorted(set(labels))
    }


def _median_best(
    row: Mapping[int, Floats], samples: npt.NDArray[np.bool_] | slice = slice(None)
) -> int:
    """Return the upper median of each sample's best window; of equals the smallest is best."""
    windows = np.array(list(row))
    cosines = np.stack(list(row.values()))[:, samples]
    best = np.sort(windows[cosines.argmax(0)])
    return int(best[len(best) // 2])
