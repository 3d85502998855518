"""Thresholds of PCA-locality by noise level, fitted to a network, with a record."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from els_service.denoisers.banks import Bank
from els_service.denoisers.files import write_atomically
from els_service.denoisers.levels import Floats
from els_service.denoisers.networks.folder import MODEL_FILE
from els_service.denoisers.pca import PcaDenoiser
from els_service.denoisers.pca_masks import Rule, ThresholdTable
from els_service.errors import InvalidArgumentError, LoadError
from els_service.experiments.calibrate import as_yaml, beside, check_outside_package, write_model
from els_service.experiments.comparison.calibration import Journal, Point, cosine, trajectory
from els_service.experiments.comparison.sampling import SampleSpec
from els_service.experiments.comparison.subjects import RECORD_FILE, Network, describe_bank
from els_service.repository import THRESHOLDS_FILE
from els_service.yaml_files import read_yaml

MACHINES: dict[str, Rule] = {"pca": "correlation", "pca-released": "released"}
"""Names of machines with thresholds, as in ``build_machines``, and their rules."""
CANDIDATES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
_JOURNAL = "calibration-journal.json"


@dataclass(frozen=True, kw_only=True)
class ThresholdSettings:
    """Machine and trajectories of a calibration of thresholds."""

    machine: str = "pca"
    """A key of ``MACHINES``."""
    samples: int = 20
    """Trajectories of the network."""
    steps: int = 20
    """Steps of a trajectory, and levels of the table."""
    seed: int = 1
    """Seed of the noise, unlike that of a comparison."""
    thresholds: tuple[float, ...] = CANDIDATES
    """Candidates τ in (0, 1]."""


def parse_thresholds(text: str | None) -> tuple[float, ...]:
    """Return the candidates of a command line, increasing: ``TAU[,TAU]``.

    Raises:
        InvalidArgumentError: One is not a number above 0 and at most 1, or there is none.
    """
    if text is None:
        return CANDIDATES
    try:
        found = tuple(sorted({float(word) for word in text.split(",") if word}))
        for tau in (*found, *(() if found else (0.0,))):
            ThresholdTable.constant(tau)
    except ValueError:
        expected = "numbers above 0, at most 1, separated by commas"
        raise InvalidArgumentError("thresholds", expected, text) from None
    return found


def calibrate_thresholds_folder(
    network: Network,
    bank: Bank,
    settings: ThresholdSettings,
    out: Path | None,
    *,
    bank_file: Path,
    device: str,
    command: str,
    progress: Callable[[int, int], None],
) -> tuple[Path, ThresholdTable]:
    """Fit thresholds to a network; return the model folder and the table.

    Arguments are those of ``calibrate_folder``, as are the errors.
    """
    info, name, rule = network.denoiser.info, settings.machine, MACHINES[settings.machine]
    try:
        machine = PcaDenoiser(bank, rule=rule, device=device)
    except ValueError as error:
        raise InvalidArgumentError("bank", "one that the machine takes", error) from error
    out = out or beside(network, name)
    check_outside_package(out)
    _check_folder(out, rule)
    description = {
        "network": network.described(),
        "bank": describe_bank(bank, info),
        "machine": name,
        **{field: getattr(settings, field) for field in ("samples", "steps", "seed")},
        "thresholds": list(settings.thresholds),
    }
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out / _JOURNAL, description)
    how = SampleSpec(settings.seed, settings.steps, "ddim", info.label_count)
    labels = how.labels(0, settings.samples)
    points = trajectory(network.denoiser, how, settings.samples)
    table, medians = calibrate_thresholds(
        machine, points, labels, settings.thresholds, journal, progress
    )
    levels = [
        {"sigma": sigma, "tau": tau, "median_cosine": {f"{t:g}": row[t] for t in row}}
        for sigma, tau, row in zip(table.sigma, table.tau, medians, strict=True)
    ]
    columns = {"sigma": list(table.sigma), "tau": list(table.tau)}
    write_atomically(out / THRESHOLDS_FILE, as_yaml(columns))
    record = {"format": "els-calibration-1", "command": command, **description, "levels": levels}
    write_atomically(out / RECORD_FILE, (json.dumps(record, indent=1) + "\n").encode())
    model: dict[str, Any] = {"kind": "pca", "rule": rule}
    write_model(out, bank_file, model, {"threshold": "auto"})
    journal.file.unlink()
    return out, table


def calibrate_thresholds(
    machine: PcaDenoiser,
    points: Sequence[Point],
    labels: Sequence[int],
    thresholds: Sequence[float],
    journal: Journal,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[ThresholdTable, list[dict[float, float]]]:
    """Return for each level the τ with the largest median cosine, and all medians.

    Args:
        machine: of the bank; its own thresholds do not matter.
        points: states of the network's trajectories, from the lowest level up.
        labels: labels of the samples, -1 for none.
        thresholds: candidates.
        journal: saves the computed cosines.
        progress: called with the number of candidates done and the total.
    """
    medians: list[dict[float, float]] = []
    total = len(points) * len(thresholds)
    for level, point in enumerate(points, 1):
        row: dict[float, float] = {}
        for tau in thresholds:
            progress((level - 1) * len(thresholds) + len(row), total)
            compute = partial(_cosine, machine, tau, point, labels)
            found = journal.once(f"{level}/{tau:g}", compute)
            row[tau] = float(np.median(found))
        medians.append(row)
    progress(total, total)
    sigma = tuple(float(point.level.sigma[0]) for point in points)
    best = tuple(max(row, key=row.__getitem__) for row in medians)
    return ThresholdTable(sigma, best), medians


def _cosine(machine: PcaDenoiser, tau: float, point: Point, labels: Sequence[int]) -> Floats:
    return cosine(machine.with_threshold(tau), point, 0, labels)


def _check_folder(out: Path, rule: Rule) -> None:
    """Raise LoadError if a folder has another model than the one that is calibrated."""
    path = out / MODEL_FILE
    if not path.exists():
        return
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise LoadError(path, f"expected a model, got {type(content).__name__}")
    held = {"rule": "correlation", "threshold": "auto"} | content
    for name, value in {"kind": "pca", "rule": rule, "threshold": "auto"}.items():
        if held.get(name) != value:
            raise LoadError(path, f"{name}: expected {value}, got {held.get(name)}")
