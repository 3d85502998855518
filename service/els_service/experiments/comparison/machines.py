"""Machines of a comparison, by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from els_kernels import GEOMETRIES, FoldedMoments, PatchAttention
from els_service.denoisers.analytic import AnalyticDenoiser
from els_service.denoisers.banks import Bank
from els_service.denoisers.base import Denoiser, DenoiserInfo
from els_service.denoisers.closed_forms import WienerDenoiser
from els_service.denoisers.fold_levels import FoldTable
from els_service.denoisers.folded import FoldedDenoiser, fold_of
from els_service.denoisers.pca import PcaDenoiser
from els_service.denoisers.pca_masks import Rule, ThresholdTable
from els_service.denoisers.smoothed import SmoothedDenoiser
from els_service.denoisers.windows import WindowTable
from els_service.errors import InvalidArgumentError
from els_service.experiments.comparison.folds import leveled_machine
from els_service.repository import FOLDS_FILE, THRESHOLDS_FILE, read_thresholds

_FOLD = "+fold"
MACHINES = tuple(sorted({machine for machine, _ in GEOMETRIES}))
CLOSED = ("pca", "pca-released", "pspc", "smoothed", "wiener")
"""``pca``: PCA-locality by correlation, or by the ``released`` rule; ``pspc``: patch posterior
composites of squares (Niedoba et al. 2025), which is ``local`` inside, with a uniform fold;
``smoothed``: smoothed closed forms (Scarvelis et al. 2025)."""
_SMOOTHING, _DRAWS = 0.2, 16
"""η and M of ``smoothed``."""


def build_machines(
    names: Sequence[str],
    bank: Bank,
    info: DenoiserInfo,
    *,
    windows: WindowTable | None = None,
    folds: FoldTable | None = None,
    thresholds: ThresholdTable | None = None,
    device: str = "cpu",
) -> dict[str, Denoiser]:
    """Return machines by name, with the padding of the network unless the name has another.

    Args:
        names: of ``MACHINES``, or MACHINE-PADDING, such as ``els-valid``; also with +fold; or of
            ``CLOSED``, which have no padding.
        bank: images of all machines.
        info: description of the network.
        windows: by noise level, clipped to the maximum; None for the default ones.
        folds: windows and folds of machines with +fold.
        thresholds: τ of ``pca`` and ``pca-released``; None for the default of ``pca``.
        device: device of the bank.

    Raises:
        InvalidArgumentError: A name is unknown or given twice, or there are no folds or thresholds
            for it, or the bank has too few or too large images for it.
    """
    if not names or len(set(names)) < len(names):
        raise InvalidArgumentError("machines", "at least one, each once", ", ".join(names))
    own = info.padding or "zeros"
    chosen = {name: _machine(name.removesuffix(_FOLD), own) for name in names if name not in CLOSED}
    attention = PatchAttention(bank.pixels().to(device)) if chosen else None
    machines: dict[str, Denoiser] = {}
    for name in names:
        if attention is None or name in CLOSED:
            machines[name] = _closed(name, bank, windows, thresholds, device)
            continue
        machine, padding = chosen[name]
        table = windows
        if name.endswith(_FOLD):
            if folds is None:
                expected = f"a folder of windows with {FOLDS_FILE}, from calibrate --folds"
                raise InvalidArgumentError("windows", expected, f"none for {name}")
            table = folds.windows
        plain = AnalyticDenoiser(
            attention, bank, machine=machine, padding=padding, window=table, clip=True
        )
        machines[name] = plain
        if folds is not None and name.endswith(_FOLD):
            machines[name] = leveled_machine(plain, bank, folds, device)
    return machines


def _closed(
    name: str,
    bank: Bank,
    windows: WindowTable | None,
    thresholds: ThresholdTable | None,
    device: str,
) -> Denoiser:
    """Return a machine of ``CLOSED``."""
    if name == "pspc":
        moments = FoldedMoments(fold_of(bank, device))
        return FoldedDenoiser(
            moments,
            bank,
            machine="local",
            padding="inside",
            fold=math.inf,
            window=windows,
            clip=True,
        )
    if name == "smoothed":
        attention = PatchAttention(bank.pixels().to(device))
        ideal = AnalyticDenoiser(attention, bank, machine="ideal")
        return SmoothedDenoiser(ideal, smoothing=_SMOOTHING, draws=_DRAWS)
    if name == "pca-released" and thresholds is None:
        raise InvalidArgumentError("thresholds", "a number or a table for pca-released", "none")
    try:
        if name == "wiener":
            return WienerDenoiser(bank)
        rule: Rule = "released" if name == "pca-released" else "correlation"
        return PcaDenoiser(bank, rule=rule, threshold=thresholds, device=device)
    except ValueError as error:
        raise InvalidArgumentError("machines", "none that rejects the bank", error) from error


def _machine(name: str, padding: str) -> tuple[str, str]:
    machine, _, own = name.partition("-")
    if machine not in MACHINES or (own and (machine, own) not in GEOMETRIES):
        expected = f"some of {', '.join((*MACHINES, *CLOSED))}, or MACHINE-PADDING"
        raise InvalidArgumentError("machines", expected, name)
    return machine, own or padding


def read_thresholds_of(text: str | None) -> ThresholdTable | None:
    """Return the thresholds of a command line: a number, or a file or folder with a table.

    Raises:
        InvalidArgumentError: It is neither, or the number is no threshold.
        LoadError: The table is rejected.
    """
    if text is None:
        return None
    path = Path(text)
    path = path / THRESHOLDS_FILE if path.is_dir() else path
    if path.is_file():
        return read_thresholds(path)
    try:
        return ThresholdTable.constant(float(text))
    except ValueError:
        expected = f"a number above 0, at most 1, or a file or folder with {THRESHOLDS_FILE}"
        raise InvalidArgumentError("thresholds", expected, text) from None
