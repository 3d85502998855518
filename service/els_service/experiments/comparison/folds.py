"""Folds of machines: candidates of a calibration, and machines with a calibrated table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from els_kernels import FoldedMoments
from els_service.denoisers.analytic import AnalyticDenoiser
from els_service.denoisers.banks import Bank
from els_service.denoisers.base import Denoiser
from els_service.denoisers.fold_levels import FoldTable, LevelFoldDenoiser
from els_service.denoisers.folded import FoldedDenoiser, check_fold, fold_of
from els_service.errors import InvalidArgumentError
from els_service.experiments.comparison.calibration import Calibration


def parse_folds(text: str | None) -> tuple[float, ...]:
    """Return the folds of a command line, increasing: ``RHO[,RHO]``, none for None.

    Raises:
        InvalidArgumentError: One is not a number from 0.05, or inf.
    """
    try:
        folds = {float(word) for word in (text or "").split(",") if word}
        for rho in folds:
            check_fold("els", "zeros", rho, sized=False)
    except ValueError:
        expected = "numbers from 0.05, or inf, separated by commas"
        raise InvalidArgumentError("folds", expected, text) from None
    # Without a fold a machine is always tried.
    return tuple(sorted(folds - {0.0}))


def folded_machines(
    plain: Denoiser, bank: Bank, folds: Sequence[float], device: str
) -> dict[float, FoldedDenoiser]:
    """Return a machine for each fold ρ > 0, otherwise like ``plain``.

    Args:
        plain: the machine without a fold.
        bank: its images.
        folds: ρ of the machines.
        device: device of the bank.

    Raises:
        InvalidArgumentError: The machine has no fold.
    """
    info = plain.info
    machine, padding = info.machine or "", info.padding or ""
    for rho in folds:
        try:
            check_fold(machine, padding, rho, sized=False)
        except ValueError as error:
            raise InvalidArgumentError("folds", "none for this machine", error) from None
    if not folds:
        return {}
    moments = FoldedMoments(fold_of(bank, device))
    return {
        rho: FoldedDenoiser(
            moments,
            bank,
            machine=machine,
            padding=padding,
            fold=rho,
            window=info.window,
            clip=True,
        )
        for rho in folds
    }


def leveled_machine(
    plain: AnalyticDenoiser, bank: Bank, table: FoldTable, device: str
) -> LevelFoldDenoiser:
    """Return a machine with the folds of a table, otherwise like ``plain``, with its windows."""
    folds = sorted(set(table.rho) - {0.0})
    return LevelFoldDenoiser({0.0: plain, **folded_machines(plain, bank, folds, device)}, table)


def best_folds(tables: Mapping[float, Calibration]) -> FoldTable:
    """Return window and fold of each level: those with the largest median cosine, the least fold.

    Args:
        tables: ρ → calibration of the machine with that fold, on the same trajectories.
    """
    first = next(iter(tables.values()))
    rho, k = [], []
    for level in range(len(first.sigma)):
        medians = {
            fold: float(np.median(found.cosines[level][found.k[level]]))
            for fold, found in sorted(tables.items())
        }
        best = max(medians, key=medians.__getitem__)
        rho.append(best)
        k.append(tables[best].k[level])
    return FoldTable(first.sigma, tuple(k), tuple(rho))


def described(table: FoldTable, tables: Mapping[float, Calibration]) -> list[dict[str, object]]:
    """Return the levels of a table in a record, with the median cosine of each fold's window."""
    return [
        {
            "sigma": sigma,
            "k": k,
            "rho": "inf" if math.isinf(rho) else rho,
            "median_cosine": {
                f"{fold:g}": float(np.median(found.cosines[level][found.k[level]]))
                for fold, found in sorted(tables.items())
            },
        }
        for level, (sigma, k, rho) in enumerate(zip(table.sigma, table.k, table.rho, strict=True))
    ]
