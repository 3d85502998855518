"""A machine whose fold, like its window, depends on the noise level."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from els_service.denoisers.analytic import AnalyticDenoiser
from els_service.denoisers.base import Denoised, DenoiserInfo, Query
from els_service.denoisers.explanations import Explanation, joined_explanations
from els_service.denoisers.folded import LEAST_FOLD, FoldedDenoiser
from els_service.denoisers.gradients import Direction, Product, joined
from els_service.denoisers.levels import Floats
from els_service.denoisers.source_banks import SourceBank
from els_service.denoisers.windows import WindowTable

Machine = AnalyticDenoiser | FoldedDenoiser


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
    """A machine with the fold of a table at each level.

    At one level it is one machine, so that sources and Jacobian products are those of that machine.

    Args:
        machines: ρ → the machine with that fold, all of one bank and one shape.
        table: whose folds are keys of ``machines``.
    """

    def __init__(self, machines: Mapping[float, Machine], table: FoldTable) -> None:
        self._machines, self.table = machines, table
        infos = [machines[rho].info for rho in sorted(machines)]
        self._info = replace(
            infos[-1],
            fold=max(table.rho),
            reuses_evidence=False,
            memory_bytes=max(info.memory_bytes for info in infos),
        )

    @property
    def info(self) -> DenoiserInfo:
        """Description of the machine; ``fold`` is the largest of the table."""
        return self._info

    @property
    def bank(self) -> SourceBank:
        """Images of the machine."""
        return next(iter(self._machines.values())).bank

    def check(self, query: Query) -> None:
        """Raise InvalidArgumentError if a shape, label or window is not supported."""
        for machine in self._machines.values():
            machine.check(query)

    def predict_seconds(self, query: Query) -> float:
        """Return the estimate of the machines that answer."""
        return sum(machine.predict_seconds(query[part]) for machine, part in self._parts(query))

    def predict_explain_seconds(self, query: Query) -> float:
        """Return the estimate of the machines that answer."""
        parts = self._parts(query)
        return sum(machine.predict_explain_seconds(query[part]) for machine, part in parts)

    def predict_product_seconds(self, query: Query, direction: Direction) -> float:
        """Return the estimate of the machines that answer."""
        parts = self._parts(query)
        return sum(
            machine.predict_product_seconds(query[part], direction) for machine, part in parts
        )

    def denoise(self, query: Query) -> Denoised:
        """Return posterior means and log evidences."""
        answers = [machine.denoise(query[part]) for machine, part in self._parts(query)]
        evidence = [answer.log_evidence for answer in answers if answer.log_evidence is not None]
        return Denoised(
            np.concatenate([answer.pixels for answer in answers]),
            np.concatenate(evidence) if len(evidence) == len(answers) else None,
        )

    def explain(self, query: Query, top: int) -> Explanation:
        """Return the statistics with the ``top`` sources of every pixel, without evidence."""
        parts = [machine.explain(query[part], top) for machine, part in self._parts(query)]
        return joined_explanations(parts)

    def variance(self, query: Query) -> npt.NDArray[np.float32]:
        """Return the posterior variance of each pixel, [B, C, H, W]."""
        return np.concatenate(
            [machine.variance(query[part]) for machine, part in self._parts(query)]
        )

    def vjp(self, query: Query, cotangent: npt.NDArray[np.float32]) -> Product:
        """Return D(x) and Jᵀg, exactly."""
        parts = self._parts(query)
        return joined([machine.vjp(query[part], cotangent[part]) for machine, part in parts])

    def jvp(self, query: Query, tangent: npt.NDArray[np.float32]) -> Product:
        """Return D(x) and J u, exactly."""
        parts = self._parts(query)
        return joined([machine.jvp(query[part], tangent[part]) for machine, part in parts])

    def _parts(self, query: Query) -> list[tuple[Machine, slice]]:
        """Return the runs of images that one machine answers, in order."""
        folds = self.table.at(query.level.sigma).tolist()
        parts, first = [], 0
        for rho, run in itertools.groupby(folds):
            last = first + len(list(run))
            parts.append((self._machines[rho], slice(first, last)))
            first = last
        return parts


def as_text(rho: float) -> str:
    """Return a fold as it is written in a document."""
    return "inf" if math.isinf(rho) else f"{rho:g}"
