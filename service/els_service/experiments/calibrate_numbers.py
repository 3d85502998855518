"""Numbers of machines without windows, fitted to a network, with a record.

Thresholds of PCA-locality by noise level, or the one smoothing η of smoothed closed forms.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from els_service.denoisers.banks import Bank
from els_service.denoisers.base import Denoiser
from els_service.denoisers.files import write_atomically
from els_service.denoisers.networks.folder import MODEL_FILE
from els_service.denoisers.pca import PcaDenoiser
from els_service.denoisers.pca_masks import ThresholdTable
from els_service.errors import InvalidArgumentError, LoadError
from els_service.experiments.calibrate import as_yaml, beside, check_outside_package, write_model
from els_service.experiments.comparison.calibration import Journal, Point, cosine, trajectory
from els_service.experiments.comparison.machines import RULES, Smoothing, build_machines
from els_service.experiments.comparison.sampling import SampleSpec
from els_service.experiments.comparison.subjects import RECORD_FILE, Network, describe_bank
from els_service.repository import THRESHOLDS_FILE
from els_service.yaml_files import read_yaml

MACHINES = (*RULES, "smoothed")
"""Machines of ``build_machines`` that have such a number."""
_JOURNAL = "calibration-journal.json"


@dataclass(frozen=True)
class Number:
    """A number of a machine.

    Attributes:
        field: name of the option with its candidates, and of their key in the record.
        candidates: default ones.
        expected: range, for errors.
        check: raises ValueError if a number is out of range.
    """

    field: str
    candidates: tuple[float, ...]
    expected: str
    check: Callable[[float], object]


THRESHOLD = Number(
    "thresholds",
    (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3),
    "numbers above 0, at most 1, separated by commas",
    ThresholdTable.constant,
)
SMOOTHING = Number(
    "smoothing",
    (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5),
    "numbers, 0 or more, separated by commas",
    Smoothing,
)


def number_of(machine: str) -> Number:
    """Return the kind of number calibrated for one of ``MACHINES``."""
    return THRESHOLD if machine in RULES else SMOOTHING


@dataclass(frozen=True, kw_only=True)
class NumberSettings:
    """Machine and trajectories of a calibration of a number."""

    machine: str = "pca"
    """One of ``MACHINES``."""
    samples: int = 20
    """Trajectories of the network."""
    steps: int = 20
    """Steps of a trajectory, and levels."""
    seed: int = 1
    """Seed of the noise, unlike that of a comparison."""
    candidates: tuple[float, ...]
    draws: int = Smoothing.draws
    """M of ``smoothed``."""


def parse_candidates(number: Number, text: str | None) -> tuple[float, ...]:
    """Return the candidates of a command line, increasing: ``N[,N]``.

    Raises:
        InvalidArgumentError: One is no number or out of range, or there is none.
    """
    if text is None:
        return number.candidates
    try:
        found = tuple(sorted({float(word) for word in text.split(",") if word}))
        for value in found:
            number.check(value)
    except ValueError:
        found = ()
    if not found:
        raise InvalidArgumentError(number.field, number.expected, text)
    return found


def calibrate_number_folder(
    network: Network,
    bank: Bank,
    settings: NumberSettings,
    out: Path | None,
    *,
    bank_file: Path,
    device: str,
    command: str,
    progress: Callable[[int, int], None],
) -> tuple[Path, tuple[float, ...]]:
    """Fit a machine's number to a network; return the model folder, and τ by level or η alone.

    Arguments are those of ``calibrate_folder``, as are the errors.
    """
    info, name = network.denoiser.info, settings.machine
    number, smoothed = number_of(name), name == "smoothed"
    out = out or beside(network, name)
    check_outside_package(out)
    machine_of = _machines(name, bank, network, settings.draws, device)
    _check_folder(out, name)
    description = {
        "network": network.described(),
        "bank": describe_bank(bank, info),
        "machine": name,
        **{key: getattr(settings, key) for key in ("samples", "steps", "seed")},
        **({"draws": settings.draws} if smoothed else {}),
        number.field: list(settings.candidates),
    }
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out / _JOURNAL, description)
    how = SampleSpec(settings.seed, settings.steps, "ddim", info.label_count)
    labels = how.labels(0, settings.samples)
    points = trajectory(network.denoiser, how, settings.samples)
    medians = median_cosines(machine_of, points, labels, settings.candidates, journal, progress)
    sigma = [float(point.level.sigma[0]) for point in points]
    best = _best_of_all(medians) if smoothed else _best_by_level(medians)
    record = {
        "format": "els-calibration-1",
        "command": command,
        **description,
        **({"eta": best[0]} if smoothed else {}),
        "levels": [
            {"sigma": s, **({} if smoothed else {"tau": best[i]}), "median_cosine": _named(row)}
            for i, (s, row) in enumerate(zip(sigma, medians, strict=True))
        ],
    }
    if not smoothed:
        write_atomically(out / THRESHOLDS_FILE, as_yaml({"sigma": sigma, "tau": list(best)}))
    write_atomically(out / RECORD_FILE, (json.dumps(record, indent=1) + "\n").encode())
    own = {"smoothing": best[0], "draws": settings.draws} if smoothed else {"threshold": "auto"}
    write_model(out, bank_file, _model(name), own)
    journal.file.unlink()
    return out, best


def _machines(
    name: str, bank: Bank, network: Network, draws: int, device: str
) -> Callable[[float], Denoiser]:
    """Return the machine as a function of its number; all share the bank and what it needs."""

    def build(value: float) -> Denoiser:
        return build_machines(
            [name],
            bank,
            network.denoiser.info,
            thresholds={"": ThresholdTable.constant(0.1)},
            smoothing=Smoothing(value, draws),
            device=device,
        )[name]

    first = build(0.0)
    return first.with_threshold if isinstance(first, PcaDenoiser) else build


def median_cosines(
    machine_of: Callable[[float], Denoiser],
    points: Sequence[Point],
    labels: Sequence[int],
    candidates: Sequence[float],
    journal: Journal,
    progress: Callable[[int, int], None],
) -> list[dict[float, float]]:
    """Return for each level the median over samples of the cosine of scores, by candidate.

    Args:
        machine_of: machine with a number.
        points: states of the network's trajectories, from the lowest level up.
        labels: labels of the samples, -1 for none.
        candidates: numbers.
        journal: saves the computed cosines.
        progress: called with the number of candidates done and the total.
    """
    medians: list[dict[float, float]] = []
    total = len(points) * len(candidates)
    for level, point in enumerate(points, 1):
        row: dict[float, float] = {}
        for value in candidates:
            progress((level - 1) * len(candidates) + len(row), total)
            compute = partial(_cosine, machine_of, value, point, labels)
            row[value] = float(np.median(journal.once(f"{level}/{value:g}", compute)))
        medians.append(row)
    progress(total, total)
    return medians


def _cosine(
    machine_of: Callable[[float], Denoiser], value: float, point: Point, labels: Sequence[int]
) -> Any:
    return cosine(machine_of(value), point, 0, labels)


def _best_by_level(medians: Sequence[Mapping[float, float]]) -> tuple[float, ...]:
    return tuple(max(row, key=row.__getitem__) for row in medians)


def _best_of_all(medians: Sequence[Mapping[float, float]]) -> tuple[float, ...]:
    """Return the candidate with the largest mean over levels, the first of equal ones."""
    return (max(medians[0], key=lambda value: sum(row[value] for row in medians)),)


def _named(row: Mapping[float, float]) -> dict[str, float]:
    return {f"{value:g}": median for value, median in row.items()}


def _model(name: str) -> dict[str, Any]:
    return {"kind": "pca", "rule": RULES[name]} if name in RULES else {"kind": "smoothed"}


def _check_folder(out: Path, name: str) -> None:
    """Raise LoadError if a folder has another model than the one that is calibrated."""
    path = out / MODEL_FILE
    if not path.exists():
        return
    if name not in RULES:
        raise LoadError(path, "expected no model, as its smoothing is found first: remove the file")
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise LoadError(path, f"expected a model, got {type(content).__name__}")
    held = {"rule": "correlation", "threshold": "auto"} | content
    for key, value in {**_model(name), "threshold": "auto"}.items():
        if held.get(key) != value:
            raise LoadError(path, f"{key}: expected {value}, got {held.get(key)}")
