"""Calibrated model folders: windows fitted to a network, with a record."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from els_service.denoisers.banks import Bank
from els_service.denoisers.base import Denoiser
from els_service.denoisers.files import write_atomically
from els_service.denoisers.fold_levels import FoldTable, as_text
from els_service.denoisers.networks.folder import MODEL_FILE
from els_service.errors import InvalidArgumentError, LoadError
from els_service.experiments.comparison.calibration import (
    Calibration,
    Journal,
    best_by_label,
    calibrate,
    trajectory,
)
from els_service.experiments.comparison.folds import best_folds, described, folded_machines
from els_service.experiments.comparison.machines import build_machines
from els_service.experiments.comparison.sampling import SampleSpec
from els_service.experiments.comparison.subjects import (
    RECORD_FILE,
    Network,
    describe_bank,
)
from els_service.repository import FOLDS_FILE, WINDOWS_FILE, bundled_models, model_folder
from els_service.yaml_files import read_yaml

_JOURNAL = "calibration-journal.json"


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """Machine, trajectories and search of a calibration."""

    machine: str = "els"
    """A name of ``build_machines``."""
    samples: int = 20
    """Trajectories of the network."""
    steps: int = 20
    """Steps of a trajectory, and levels of the table."""
    seed: int = 1
    """Seed of the noise; unlike that of a comparison, whose images must not be fitted."""
    search: str = "all"
    """One of ``SEARCHES``."""
    windows: tuple[int, ...] | None = None
    """Odd candidates; None for all from 3 to the image's smaller side."""
    folds: tuple[float, ...] = ()
    """Folds ρ that are tried beside none, from 0.05 to infinity."""


def calibrate_folder(
    network: Network,
    bank: Bank,
    settings: CalibrationSettings,
    out: Path | None,
    *,
    bank_file: Path,
    device: str,
    command: str,
    progress: Callable[[int, int], None],
) -> tuple[Path, Calibration]:
    """Fit a machine's windows to a network; return the model folder and the table.

    Args:
        network: network whose score is fitted.
        bank: images of the machine.
        settings: settings, which a resumed run must repeat.
        out: analytic model folder, created if missing; None for NAME-MACHINE next to the network.
        bank_file: file of the bank, named in a new ``model.yaml``.
        device: device of the bank.
        command: command for the record.
        progress: called with the number of steps done and the total.

    Raises:
        InvalidArgumentError: A setting does not fit the machine, or ``out`` is in the package.
        LoadError: ``out`` has another model, or a run with other settings.
    """
    info = network.denoiser.info
    name = settings.machine
    machine = build_machines([name], bank, info, device=device)[name]
    windows = _candidates(settings.windows, machine)
    if machine.info.fold and settings.folds:
        raise InvalidArgumentError("folds", f"none for {name}", list(settings.folds))
    out = out or beside(network, name)
    check_outside_package(out)
    _check_folder(out, machine)
    description = {
        "network": network.described(),
        "bank": describe_bank(bank, info),
        "machine": machine.info.machine,
        "padding": machine.info.padding,
        **{name: getattr(settings, name) for name in ("samples", "steps", "seed", "search")},
        "windows": list(windows),
        **({"folds": [as_text(rho) for rho in settings.folds]} if settings.folds else {}),
    }
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out / _JOURNAL, description)
    how = SampleSpec(settings.seed, settings.steps, "ddim", info.label_count)
    labels = how.labels(0, settings.samples)
    machines: dict[float, Denoiser] = {
        0.0: machine,
        **folded_machines(machine, bank, settings.folds, device),
    }
    points = trajectory(network.denoiser, how, settings.samples)
    tables: dict[float, Calibration] = {}
    journals = {rho: _journal(journal, rho) for rho in machines}
    for rho, each in machines.items():
        tables[rho] = calibrate(
            each,
            points,
            labels,
            windows,
            journals[rho],
            search=settings.search,
            report=_reporter(progress, windows, settings.steps),
        )
    progress(1, 1)
    found = tables[0.0]
    record = _record(description, found, labels, command)
    best = best_folds(tables) if settings.folds else None
    if best is not None:
        record["folds"] = described(best, tables)
    _write(out, machine, bank_file, found, record, best)
    for written in journals.values():
        written.file.unlink()
    return out, found


def _journal(plain: Journal, rho: float) -> Journal:
    """Return the journal of a machine with a fold, beside that of the machine without."""
    if rho == 0:
        return plain
    return Journal(plain.file.with_name(f"calibration-journal-{as_text(rho)}.json"), plain.settings)


def _reporter(
    progress: Callable[[int, int], None], windows: Sequence[int], levels: int
) -> Callable[[int, int], None]:
    return lambda level, window: progress(
        (level - 1) * len(windows) + windows.index(window), levels * len(windows)
    )


def _candidates(requested: tuple[int, ...] | None, machine: Denoiser) -> tuple[int, ...]:
    """Return the odd windows to try; by default from 3 to the image's smaller side."""
    largest = machine.info.max_window
    if not largest:
        raise InvalidArgumentError("machine", "one with a window", machine.info.machine)
    if requested is None:
        side = min(machine.info.shape[1:])
        return tuple(range(min(3, largest), min(side, largest) + 1, 2))
    for k in requested:
        if k % 2 == 0 or not 1 <= k <= largest:
            raise InvalidArgumentError("windows", f"odd numbers from 1 to {largest}", k)
    return tuple(sorted(set(requested)))


def check_outside_package(out: Path) -> None:
    """Raise InvalidArgumentError if a folder is in the installed package."""
    if out.resolve().is_relative_to(bundled_models().resolve()):
        raise InvalidArgumentError("out", "a folder outside the package", out)


def beside(network: Network, machine: str) -> Path:
    """Return the folder of a machine that is calibrated to a network."""
    model = model_folder(network.folder)
    return model.with_name(f"{model.name}-{machine}")


def _check_folder(out: Path, machine: Denoiser) -> None:
    """Check that a folder is empty or has the model that is calibrated.

    Raises:
        LoadError: Its ``model.yaml`` has another kind, machine, padding or window.
    """
    path = out / MODEL_FILE
    if not path.exists():
        return
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise LoadError(path, f"expected a model, got {type(content).__name__}")
    held = {"padding": "zeros", "window": "auto"} | content
    info = machine.info
    wanted = {"kind": "analytic", "machine": info.machine, "padding": info.padding}
    for name, value in {**wanted, "window": "auto"}.items():
        if held.get(name) != value:
            raise LoadError(path, f"{name}: expected {value}, got {held.get(name)}")


def _record(
    settings: Mapping[str, Any], found: Calibration, labels: Sequence[int], command: str
) -> dict[str, Any]:
    levels = [
        {
            "sigma": sigma,
            "k": k,
            "median_cosine": {str(window): float(np.median(of)) for window, of in row.items()},
        }
        for sigma, k, row in zip(found.sigma, found.k, found.cosines, strict=True)
    ]
    record = {"format": "els-calibration-1", "command": command, **settings, "levels": levels}
    # A climb evaluates too few windows to find the best ones for each label.
    if settings["network"]["label_count"] and settings["search"] == "all":
        record["k_by_label"] = best_by_label(found, labels)
    return record


def _write(
    out: Path,
    machine: Denoiser,
    bank: Path,
    found: Calibration,
    record: dict[str, Any],
    folds: FoldTable | None,
) -> None:
    """Write tables and record, and a model if there is none and it can be served."""
    table = {"sigma": list(found.sigma), "k": list(found.k)}
    write_atomically(out / WINDOWS_FILE, as_yaml(table))
    if folds is not None:
        columns = {"sigma": list(folds.sigma), "k": list(folds.k), "rho": list(folds.rho)}
        write_atomically(out / FOLDS_FILE, as_yaml(columns))
    # Last, because it identifies the network of the windows.
    write_atomically(out / RECORD_FILE, (json.dumps(record, indent=1) + "\n").encode())
    info = machine.info
    model = {"kind": "analytic", "machine": info.machine, "padding": info.padding}
    auto = {"window": "auto"}
    if folds is not None or info.fold:
        auto["fold"] = "auto" if folds is not None else as_text(info.fold)
    write_model(out, bank, model, auto)


def write_model(out: Path, bank: Path, model: Mapping[str, Any], auto: Mapping[str, Any]) -> None:
    """Write a ``model.yaml`` if there is none and it can be served.

    Args:
        out: model folder.
        bank: file of its bank.
        model: keys before the bank.
        auto: keys after it.
    """
    if (out / MODEL_FILE).exists():
        return
    root = model_folder(out).parent
    if bank.suffix != ".safetensors" or not bank.resolve().is_relative_to(root):
        print(f"no {MODEL_FILE} was written: {bank} is not a bank (.safetensors) inside {root}")
        return
    where = os.path.relpath(bank.resolve(), out.resolve())
    write_atomically(out / MODEL_FILE, as_yaml({**model, "bank": where, **auto}))


def as_yaml(document: Mapping[str, Any]) -> bytes:
    """Return a document as text."""
    # Lists on one line, everything else indented.
    return yaml.safe_dump(document, sort_keys=False, default_flow_style=None, width=100).encode()
