"""A machine whose fold, like its window, depends on the noise level."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from els_service.denoisers.base import Denoised, Denoiser, DenoiserInfo, Query
from els_service.denoisers.folded import LEAST_FOLD
from els_service.denoisers.levels import Floats
from els_service.denoisers.windows import WindowTable


@dataclass(frozen=True)
class FoldTable:
    """Windows ``k`` and folds ``rho`` at increasing noise levels ``sigma`` = s/a.

    A level has the fold of the entry that is nearest in log σ.

    Raises:
        ValueError: The table is no table of windows, or a fold is out of range.
    """

    sigma: tuple[float, ...]
    k: tuple[int, ...]
    rho: tuple[float, ...]

    def __post_init__(self) -> None:
        WindowTable(self.sigma, self.k)
        if len(self.rho) != len(self.sigma):
            raise ValueError(f"rho: expected {len(self.sigma)} values, got {len(self.rho)}")
        for rho in self.rho:
            if not (rho == 0 or rho >= LEAST_FOLD):
                raise ValueError(f"rho: expected 0, at least {LEAST_FOLD}, or inf, got {rho}")

    @property
    def windows(self) -> WindowTable:
        """The windows by noise level."""
        return WindowTable(self.sigma, self.k)

    def at(self, sigma: Floats) -> Floats:
        """Return the fold at each level, [B]."""
        distance = np.abs(np.log(sigma)[:, None] - np.log(self.sigma))
        found: Floats = np.array(self.rho, np.float64)[distance.argmin(1)]
        return found


class LevelFoldDenoiser:
    """A machine with the fold of a table at each level; it has neither gradients nor sources.

    Args:
        machines: ρ → the machine with that fold, all of one bank and one shape.
        table: whose folds are keys of ``machines``.
    """

    def __init__(self, machines: Mapping[float, Denoiser], table: FoldTable) -> None:
        self._machines, self.table = machines, table
        infos = [machines[rho].info for rho in sorted(machines)]
        self._info = replace(
            infos[-1],
            fold=max(table.rho),
            has_gradients=False,
            has_sources=False,
            reuses_evidence=False,
            memory_bytes=max(info.memory_bytes for info in infos),
        )

    @property
    def info(self) -> DenoiserInfo:
        """Description of the machine; ``fold`` is the largest of the table."""
        return self._info

    def check(self, query: Query) -> None:
        """Raise InvalidArgumentError if a shape, label or window is not supported."""
        for machine in self._machines.values():
            machine.check(query)

    def predict_seconds(self, query: Query) -> float:
        """Return the estimate of the machines that answer."""
        return sum(machine.predict_seconds(part) for machine, part in self._parts(query))

    def denoise(self, query: Query) -> Denoised:
        """Return posterior means and log evidences."""
        answers = [machine.denoise(part) for machine, part in self._parts(query)]
        evidence = [answer.log_evidence for answer in answers if answer.log_evidence is not None]
        return Denoised(
            np.concatenate([answer.pixels for answer in answers]),
            np.concatenate(evidence) if len(evidence) == len(answers) else None,
        )

    def _parts(self, query: Query) -> list[tuple[Denoiser, Query]]:
        """Return runs of images that one machine answers, in order."""
        folds = self.table.at(query.level.sigma).tolist()
        parts, first = [], 0
        for rho, run in itertools.groupby(folds):
            last = first + len(list(run))
            parts.append((self._machines[rho], query[slice(first, last)]))
            first = last
        return parts


def as_text(rho: float) -> str:
    """Return a fold as it is written in a document."""
    return "inf" if math.isinf(rho) else f"{rho:g}"
