"""Subjects of a comparison: a network by name or folder, a bank, and windows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from els_service.denoisers.analytic import bank_info
from els_service.denoisers.banks import Bank
from els_service.denoisers.base import Denoiser, DenoiserInfo
from els_service.denoisers.fold_levels import FoldTable
from els_service.denoisers.networks import MODEL_FILE, WEIGHTS_FILE
from els_service.denoisers.windows import PUBLISHED, WindowTable
from els_service.errors import InvalidArgumentError, LoadError
from els_service.experiments.training import load_training_data
from els_service.repository import (
    FOLDS_FILE,
    WINDOWS_FILE,
    bundled_models,
    load_network_folder,
    model_folder,
    newest_version,
    read_folds,
    read_windows,
)

RECORD_FILE = "calibration.json"


@dataclass(frozen=True)
class Network:
    """A trained network and its origin."""

    name: str
    folder: Path
    denoiser: Denoiser
    fingerprint: str
    """SHA-256 (hex) of its weights file."""
    parameters: int

    def described(self) -> dict[str, Any]:
        """Return its description in a record."""
        info = self.denoiser.info
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "architecture": info.machine,
            "padding": info.padding,
            "parameters": self.parameters,
            "label_count": info.label_count,
            "implementation": info.implementation,
        }


def open_network(name: str, models: Path | None = None, device: str = "cpu") -> Network:
    """Return the network of a served model, or of a folder.

    Args:
        name: model in ``models``, NAME or NAME/VERSION, or a path; ``./NAME`` is always a path.
        models: folder of served models; None for the bundled ones.
        device: device to run on.

    Raises:
        InvalidArgumentError: Neither a model nor a folder has that name, or both have.
        LoadError: A file is missing or rejected; names it and the field or tensor.
    """
    folder = newest_version(_folder_of(name, models or bundled_models()))
    weights = folder / WEIGHTS_FILE
    denoiser = load_network_folder(folder, device)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    return Network(Path(name).resolve().name, folder, denoiser, digest, _count(weights))


def _folder_of(name: str, models: Path) -> Path:
    path = Path(name)
    inside = not path.is_absolute() and ".." not in path.parts and not name.startswith(".")
    places = (models / path, path) if inside else (path,)
    folders = [folder for folder in places if name and folder.is_dir()]
    if not folders:
        raise InvalidArgumentError("network", f"a model in {models}, or a model folder", name)
    # A folder of the same name may be something else, such as the output of a comparison.
    found = [folder for folder in folders if (newest_version(folder) / MODEL_FILE).exists()]
    if len(found) == 2 and not found[0].samefile(found[1]):
        expected = f"one model: there is one in {models}, and ./{name}"
        raise InvalidArgumentError("network", expected, name)
    return (found or folders)[0]


def _count(weights: Path) -> int:
    with safe_open(weights, framework="np") as tensors:
        # It has keys but is not iterable.
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
    return sum(int(np.prod(shape)) for shape in shapes)


def open_bank(path: Path, info: DenoiserInfo, limit: int | None = None) -> Bank:
    """Return a bank, or a data set as a bank, that matches a network.

    Args:
        path: bank or data set, as for ``load_training_data``.
        info: description of the network.
        limit: maximum number of images, evenly from all labels, the first of each.

    Raises:
        LoadError: The file is missing or rejected.
        InvalidArgumentError: Its images have another shape, or labels of the network are missing.
    """
    bank = load_training_data([path])
    if bank.shape != info.shape:
        expected = f"images of shape {list(info.shape)} as the network's"
        raise InvalidArgumentError("bank", expected, list(bank.shape))
    if info.label_count:
        missing = sorted(set(range(info.label_count)) - set(bank.labels.tolist()))
        if missing:
            expected = f"images of all {info.label_count} labels of the conditional network"
            got = "an unlabelled bank" if not bank.label_count else f"none of {missing}"
            raise InvalidArgumentError("bank", expected, got)
    return bank if limit is None else _limited(bank, limit)


def open_network_and_bank(
    name: str, models: Path | None, bank: Path, limit: int | None, device: str
) -> tuple[Network, Bank]:
    """Return a network as ``open_network`` does, and a bank that matches it as ``open_bank``."""
    network = open_network(name, models, device)
    return network, open_bank(bank, network.denoiser.info, limit)


def _limited(bank: Bank, limit: int) -> Bank:
    starts, counts = np.unique(bank.labels, return_index=True, return_counts=True)[1:]
    if limit < len(starts):
        expected = f"at least {len(starts)}, an image of each label"
        raise InvalidArgumentError("bank-limit", expected, limit)
    each = limit // len(starts)
    kept = np.concatenate(
        [
            np.arange(start, start + min(each, count))
            for start, count in zip(starts, counts, strict=True)
        ]
    )
    images, labels = bank.images[kept], bank.labels[kept]
    return replace(bank, images=images, labels=labels, file_names=None)


def describe_bank(bank: Bank, info: DenoiserInfo) -> dict[str, Any]:
    """Return the description of a bank, and whether the network was trained on exactly it."""
    trained_on = info.bank.fingerprint if info.bank else None
    return vars(bank_info(bank)) | {"is_training_data": bank.fingerprint == trained_on}


@dataclass(frozen=True)
class Windows:
    """A table of windows, None for the default one, its origin, and the folds beside it."""

    table: WindowTable | None
    source: str
    folds: FoldTable | None = None
    of_machines: Mapping[str, Windows] = field(default_factory=dict)
    """Tables of single machines, by name; all others have this one."""

    def of(self, machine: str) -> Windows:
        """Return the windows of a machine."""
        return self.of_machines.get(machine, self)


def windows_of(network: Network, requested: str, machines: Sequence[str]) -> Windows:
    """Return the windows for a comparison of several machines.

    Args:
        network: network whose calibration is used.
        requested: ``TABLE``; or ``[TABLE,]MACHINE=TABLE[,MACHINE=TABLE]``, with tables of single
            machines; each as for ``find_windows``. Machines without a table of their own have the
            first one, by default ``calibrated``.
        machines: names that may have a table.

    Raises:
        LoadError: A table or record cannot be read.
        InvalidArgumentError: A named file does not exist, or a machine is unknown or named twice.
    """
    tables = by_machine("windows", requested, machines)
    general = find_windows(network, tables.pop("", "calibrated"))
    own = {machine: find_windows(network, table) for machine, table in tables.items()}
    return replace(general, of_machines=own)


def by_machine(field: str, text: str, machines: Sequence[str]) -> dict[str, str]:
    """Return machine → table of ``[TABLE,]MACHINE=TABLE[,MACHINE=TABLE]``; "" for the first one.

    Raises:
        InvalidArgumentError: A machine is unknown or named twice, or the second table has none.
    """
    if "=" not in text or Path(text).exists():
        return {"": text}
    found: dict[str, str] = {}
    for i, part in enumerate(text.split(",")):
        machine, assigned, table = part.strip().partition("=")
        if not assigned and i == 0:
            found[""] = machine
            continue
        if not assigned or machine in found or machine not in machines:
            expected = f"one table, then MACHINE=TABLE for some of {', '.join(machines)}, each once"
            raise InvalidArgumentError(field, expected, part)
        found[machine] = table
    return found


def find_windows(network: Network, requested: str = "calibrated") -> Windows:
    """Return the windows for a comparison.

    Args:
        network: network whose calibration is used.
        requested: ``calibrated`` for the table in the network's folder, unless its record names
            other weights; otherwise in a sibling folder whose record names these weights, otherwise
            the default; ``auto`` or ``fashion-mnist-resnet`` for the default; an odd number; or a
            file or folder with a table.

    Raises:
        LoadError: A table or record cannot be read.
        InvalidArgumentError: The named file does not exist.
    """
    if requested in ("auto", PUBLISHED):
        return Windows(None, "auto")
    if requested.isdecimal():
        if int(requested) % 2 == 0:
            raise InvalidArgumentError("windows", "an odd number", requested)
        return Windows(WindowTable.constant(int(requested)), "constant")
    if requested == "calibrated":
        found = _calibrated(network)
        return Windows(None, "auto") if found is None else _from_file(found)
    path = Path(requested)
    path = path / WINDOWS_FILE if path.is_dir() else path
    if not path.is_file():
        expected = (
            "calibrated, fashion-mnist-resnet, an odd number, or a file or folder with a table"
        )
        raise InvalidArgumentError("windows", expected, requested)
    return _from_file(path)


def _calibrated(network: Network) -> Path | None:
    own = network.folder / RECORD_FILE
    # A table without a record was written by hand.
    if own.with_name(WINDOWS_FILE).exists() and (not own.exists() or _is_of(own, network)):
        return own.with_name(WINDOWS_FILE)
    siblings = sorted(model_folder(network.folder).parent.glob(f"*/{RECORD_FILE}"))
    found = (record for record in siblings if record != own.resolve() and _is_of(record, network))
    return next((record.with_name(WINDOWS_FILE) for record in found), None)


def _is_of(record: Path, network: Network) -> bool:
    """Return whether a record is of a calibration of ELS to exactly these weights."""
    try:
        content = json.loads(record.read_bytes())
        fingerprint, machine = content["network"]["fingerprint"], content["machine"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LoadError(record, f"expected the record of a calibration: {error}") from error
    return bool(fingerprint == network.fingerprint and machine == "els")


def _from_file(path: Path) -> Windows:
    folds = path.with_name(FOLDS_FILE)
    source = f"{path.resolve().parent.name}/{path.name}"
    return Windows(read_windows(path), source, read_folds(folds) if folds.exists() else None)
