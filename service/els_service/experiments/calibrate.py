"""Fit windows to a network: ``python -m els_service.experiments.calibrate``.

Requires only torch, numpy, safetensors, PyYAML and Pillow.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from els_service.denoisers.analytic import AnalyticDenoiser
from els_service.denoisers.files import write_atomically
from els_service.denoisers.networks.folder import MODEL_FILE
from els_service.errors import InvalidArgumentError, LoadError
from els_service.experiments.command_line import (
    Progress,
    listed,
    positive,
    prepared_device,
    refusing,
)
from els_service.experiments.comparison.calibration import (
    SEARCHES,
    Calibration,
    Journal,
    best_by_label,
    calibrate,
    trajectory,
)
from els_service.experiments.comparison.drawing import SampleSpec, check_seed
from els_service.experiments.comparison.options import add_shared
from els_service.experiments.comparison.subjects import (
    BUNDLED_MODELS,
    RECORD_FILE,
    WINDOWS_FILE,
    Network,
    build_machines,
    describe_bank,
    find_windows,
    model_folder,
    open_bank,
    open_network,
)
from els_service.yaml_files import read_yaml

_JOURNAL = "calibration-journal.json"
_SEED = 1


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run a calibration; return the exit code: 0, 2 for invalid input, 130 for Ctrl-C.

    Args:
        arguments: without the program's name; None for sys.argv.
        program: name of the command in the help and the record.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser(program or "python -m els_service.experiments.calibrate")
    options = parser.parse_args(arguments)
    command = shlex.join([*parser.prog.split(), *arguments])
    return refusing(parser.prog, lambda: _calibrate(options, command))


def _calibrate(options: argparse.Namespace, command: str) -> None:
    check_seed(options.seed)
    device = prepared_device(options)
    network = open_network(options.network, options.models, device)
    info = network.denoiser.info
    bank = open_bank(options.bank, info, options.bank_limit)
    machine = build_machines([options.machine], bank, info, device=device)[options.machine]
    windows = _candidates(options.windows, machine)
    out = options.out or _beside(network, options.machine)
    if out.resolve().is_relative_to(BUNDLED_MODELS.resolve()):
        raise InvalidArgumentError("out", "a folder outside the package", out)
    _check_folder(out, machine)
    settings = {
        "network": network.described(),
        "bank": describe_bank(bank, info),
        "machine": machine.info.machine,
        "padding": machine.info.padding,
        **{name: getattr(options, name) for name in ("samples", "steps", "seed", "search")},
        "windows": list(windows),
    }
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out / _JOURNAL, settings)
    how = SampleSpec(options.seed, options.steps, "ddim", info.label_count)
    labels = how.labels(0, options.samples)
    progress = Progress("calibrate")
    found = calibrate(
        machine,
        trajectory(network.denoiser, how, options.samples),
        labels,
        windows,
        journal,
        search=options.search,
        report=_reporter(progress, windows, options.steps),
    )
    progress(1, 1)
    _write(out, machine, options.bank, found, _record(settings, found, labels, command))
    journal.file.unlink()
    print(f"windows {' '.join(map(str, found.k))}\nwritten: {out}")
    if find_windows(network).source != f"{out.resolve().name}/{WINDOWS_FILE}":
        print(f"for a comparison with these windows: --windows {out}")


def _reporter(
    progress: Progress, windows: Sequence[int], levels: int
) -> Callable[[int, int], None]:
    return lambda level, window: progress(
        (level - 1) * len(windows) + windows.index(window), levels * len(windows)
    )


def _candidates(requested: tuple[int, ...] | None, machine: AnalyticDenoiser) -> tuple[int, ...]:
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


def _beside(network: Network, machine: str) -> Path:
    model = model_folder(network.folder)
    return model.with_name(f"{model.name}-{machine}")


def _check_folder(out: Path, machine: AnalyticDenoiser) -> None:
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
    out: Path, machine: AnalyticDenoiser, bank: Path, found: Calibration, record: dict[str, Any]
) -> None:
    """Write table and record, and a model if there is none and it can be served."""
    table = {"sigma": list(found.sigma), "k": list(found.k)}
    write_atomically(out / WINDOWS_FILE, _text(table))
    # Last, because it identifies the network of the windows.
    write_atomically(out / RECORD_FILE, (json.dumps(record, indent=1) + "\n").encode())
    if (out / MODEL_FILE).exists():
        return
    root = model_folder(out).parent
    if bank.suffix != ".safetensors" or not bank.resolve().is_relative_to(root):
        print(f"no {MODEL_FILE} was written: {bank} is not a bank (.safetensors) inside {root}")
        return
    where = os.path.relpath(bank.resolve(), out.resolve())
    info = machine.info
    model = {"kind": "analytic", "machine": info.machine, "padding": info.padding}
    write_atomically(out / MODEL_FILE, _text(model | {"bank": where, "window": "auto"}))


def _text(document: Mapping[str, Any]) -> bytes:
    # Lists on one line, everything else indented.
    return yaml.safe_dump(document, sort_keys=False, default_flow_style=None, width=100).encode()


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        program,
        description="Find the windows by noise level for which a machine's score is closest to a "
        "network's; writes windows.yaml and calibration.json to an analytic model folder. The same "
        "command resumes an interrupted run. Without a network: --held-out MODEL_FOLDER, with its "
        "own --help.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("network", metavar="MODEL", help="name of a served model, or a network's model folder")
    add_shared(parser)
    add("--machine", default="els", help="els or local, or MACHINE-PADDING")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="analytic model folder, created if missing; by default MODEL-MACHINE next to MODEL",
    )
    add(
        "--samples",
        type=positive("samples"),
        default=20,
        help="trajectories of the network",
    )
    add(
        "--steps",
        type=positive("steps"),
        default=20,
        help="steps, and levels of the table",
    )
    add("--seed", type=int, default=_SEED, help="seed of the noise, unlike that of `compare`")
    add(
        "--search",
        choices=SEARCHES,
        default="all",
        help="all windows; climb: 3 times faster",
    )
    add(
        "--windows",
        type=listed("windows"),
        metavar="K[,K]",
        help="odd candidates; by default from 3 to the side",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
