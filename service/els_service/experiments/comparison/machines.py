"""Machines of a comparison, by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from els_kernels import GEOMETRIES, FoldedMoments, PatchAttention
from els_service.denoisers.analytic import AnalyticDenoiser
from els_service.denoisers.banks import Bank
from els_service.denoisers.base import Denoiser, DenoiserInfo
from els_service.denoisers.closed_forms import WienerDenoiser
from els_service.denoisers.folded import FoldedDenoiser, fold_of
from els_service.denoisers.pca import BankSpectra, PcaDenoiser
from els_service.denoisers.pca_masks import Rule, ThresholdTable
from els_service.denoisers.smoothed import MAX_DRAWS, SmoothedDenoiser
from els_service.errors import InvalidArgumentError
from els_service.experiments.comparison.folds import leveled_machine
from els_service.experiments.comparison.subjects import Windows, by_machine
from els_service.repository import FOLDS_FILE, THRESHOLDS_FILE, read_thresholds

_FOLD = "+fold"
MACHINES = tuple(sorted({machine for machine, _ in GEOMETRIES}))
CLOSED = ("pca", "pca-released", "pspc", "smoothed", "wiener")
"""``pca``: PCA-locality by correlation, or by the ``released`` rule; ``pspc``: patch posterior
composites of squares (Niedoba et al. 2025), which is ``local`` inside, with a uniform fold;
``smoothed``: smoothed closed forms (Scarvelis et al. 2025)."""
RULES: dict[str, Rule] = {"pca": "correlation", "pca-released": "released"}
"""Rules of the machines of PCA-locality."""
_MASKS_BYTES = 512 << 20
"""Masks of 20 levels of 10 labels of 3,072 coordinates are 236 MB: each is computed once."""


@dataclass(frozen=True)
class Smoothing:
    """Smoothing η ≥ 0 and number M of draws of ``smoothed``.

    Raises:
        InvalidArgumentError: One is out of range.
    """

    eta: float = 0.2
    draws: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.eta < math.inf:
            raise InvalidArgumentError("smoothing", "a number, 0 or more", self.eta)
        if not 1 <= self.draws <= MAX_DRAWS:
            raise InvalidArgumentError("draws", f"1 to {MAX_DRAWS}", self.draws)


def build_machines(
    names: Sequence[str],
    bank: Bank,
    info: DenoiserInfo,
    *,
    windows: Windows | None = None,
    thresholds: Mapping[str, ThresholdTable] | None = None,
    smoothing: Smoothing | None = None,
    device: str = "cpu",
) -> dict[str, Denoiser]:
    """Return machines by name, with the padding of the network unless the name has another.

    Args:
        names: of ``MACHINES``, or MACHINE-PADDING, such as ``els-valid``; also with +fold; or of
            ``CLOSED``, which have no padding.
        bank: images of all machines.
        info: description of the network.
        windows: by noise level, clipped to the maximum, with the folds of machines with +fold; None
            for the default ones.
        thresholds: τ of ``pca`` and ``pca-released``, by name, "" for both; None for the default
            of ``pca``.
        smoothing: of ``smoothed``; None for the default one.
        device: device of the bank.

    Raises:
        InvalidArgumentError: A name is unknown or given twice, or there are no folds or thresholds
            for it, or a machine without windows has some, or the bank has too few or too large
            images for it.
    """
    if not names or len(set(names)) < len(names):
        raise InvalidArgumentError("machines", "at least one, each once", ", ".join(names))
    padding, windows = info.padding or "zeros", windows or Windows(None, "auto")
    # Before anything is computed, which takes long for some.
    chosen = {
        name: _machine(name.removesuffix(_FOLD), padding) for name in names if name not in CLOSED
    }
    build = _Build(bank, windows, thresholds or {}, smoothing, device)
    machines: dict[str, Denoiser] = {}
    for name in names:
        if name in CLOSED:
            machines[name] = build.closed(name)
        else:
            machines[name] = build.analytic(name, *chosen[name])
        if name in windows.of_machines and machines[name].info.window is None:
            raise InvalidArgumentError("windows", "tables of machines with windows", name)
    return machines


@dataclass(frozen=True, eq=False)
class _Build:
    """Arguments of ``build_machines``, and what several machines share."""

    bank: Bank
    windows: Windows
    thresholds: Mapping[str, ThresholdTable]
    smoothing: Smoothing | None
    device: str

    @cached_property
    def attention(self) -> PatchAttention:
        return PatchAttention(self.bank.pixels().to(self.device))

    @cached_property
    def spectra(self) -> BankSpectra:
        return BankSpectra(self.bank, self.device)

    def analytic(self, name: str, machine: str, padding: str) -> Denoiser:
        """Return a machine of ``MACHINES``, with folds if its name ends with +fold."""
        own = self.windows.of(name)
        folds = own.folds if name.endswith(_FOLD) else None
        if folds is None and name.endswith(_FOLD):
            expected = f"a folder of windows with {FOLDS_FILE}, from calibrate --folds"
            raise InvalidArgumentError("windows", expected, f"none for {name}")
        plain = AnalyticDenoiser(
            self.attention,
            self.bank,
            machine=machine,
            padding=padding,
            window=own.table if folds is None else folds.windows,
            clip=True,
        )
        return plain if folds is None else leveled_machine(plain, self.bank, folds, self.device)

    def closed(self, name: str) -> Denoiser:
        """Return a machine of ``CLOSED``."""
        if name == "pspc":
            return FoldedDenoiser(
                FoldedMoments(fold_of(self.bank, self.device)),
                self.bank,
                machine="local",
                padding="inside",
                fold=math.inf,
                window=self.windows.of(name).table,
                clip=True,
            )
        if name == "smoothed":
            ideal = AnalyticDenoiser(self.attention, self.bank, machine="ideal")
            chosen = self.smoothing or Smoothing()
            return SmoothedDenoiser(ideal, smoothing=chosen.eta, draws=chosen.draws)
        threshold = self.thresholds.get(name, self.thresholds.get(""))
        if name == "pca-released" and threshold is None:
            raise InvalidArgumentError("thresholds", "a number or a table for pca-released", "none")
        try:
            if name == "wiener":
                return WienerDenoiser(self.bank)
            return PcaDenoiser(
                self.bank,
                rule=RULES[name],
                threshold=threshold,
                spectra=self.spectra,
                masks_bytes=_MASKS_BYTES,
            )
        except ValueError as error:
            raise InvalidArgumentError("machines", "none that rejects the bank", error) from error


def _machine(name: str, padding: str) -> tuple[str, str]:
    machine, _, own = name.partition("-")
    if machine not in MACHINES or (own and (machine, own) not in GEOMETRIES):
        expected = f"some of {', '.join((*MACHINES, *CLOSED))}, or MACHINE-PADDING"
        raise InvalidArgumentError("machines", expected, name)
    return machine, own or padding


def read_thresholds_of(
    text: str | None, machines: Sequence[str] = tuple(RULES)
) -> dict[str, ThresholdTable]:
    """Return the thresholds of a command line, by machine, "" for all others; none for None.

    Args:
        text: ``TABLE``, or ``[TABLE,]MACHINE=TABLE[,MACHINE=TABLE]``; each a number, or a file or
            folder with a table.
        machines: names that may have a table.

    Raises:
        InvalidArgumentError: A table is neither, or the number is no threshold.
        LoadError: A table is rejected.
    """
    if text is None:
        return {}
    return {
        machine: _thresholds(table)
        for machine, table in by_machine("thresholds", text, machines).items()
    }


def _thresholds(text: str) -> ThresholdTable:
    path = Path(text)
    path = path / THRESHOLDS_FILE if path.is_dir() else path
    if path.is_file():
        return read_thresholds(path)
    try:
        return ThresholdTable.constant(float(text))
    except ValueError:
        expected = f"a number above 0, at most 1, or a file or folder with {THRESHOLDS_FILE}"
        raise InvalidArgumentError("thresholds", expected, text) from None
