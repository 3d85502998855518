"""Packages a trained network for distribution: weights, record, log, windows and a model card.

    python -m benchmarks.package_model TRAINED BUNDLED/NAME [--windows CALIBRATED]

The checkpoint is omitted, and paths in commands are reduced to their last part. Weights are stored
in float16 if that changes no result by more than 1e-3 of its norm. TRAINED is the output of a
finished ``els-server train`` with --source and --licence; CALIBRATED that of ``els-server
calibrate``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from els_service.denoisers.base import make_query
from els_service.denoisers.levels import from_time
from els_service.denoisers.networks import (
    MODEL_FILE,
    WEIGHTS_FILE,
    build_network,
    parse_network,
    save_network_folder,
)
from els_service.denoisers.networks.folder import read_weights
from els_service.errors import ElsError, InvalidArgumentError, LoadError
from els_service.experiments.comparison.subjects import RECORD_FILE as CALIBRATION_FILE
from els_service.experiments.training.loop import RECORD_FILE
from els_service.experiments.training.record import LOG_FILE, PLOT_FILE
from els_service.repository import WINDOWS_FILE, load_network_folder

CARD_FILE = "README.md"
MOST_BYTES, MOST_BYTES_TOGETHER = 16_000_000, 30_000_000
"""Maximum bytes of one folder, and of all packaged folders."""
_HALF_BUDGET = 1e-3


def main(arguments: Sequence[str] | None = None) -> int:
    """Package a network; return the exit code: 0, or 2 for invalid input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trained", type=Path, metavar="TRAINED", help="a finished model folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to create")
    parser.add_argument("--windows", type=Path, metavar="CALIBRATED", help="an analytic folder")
    options = parser.parse_args(arguments)
    try:
        pack(options.trained, options.out, options.windows)
    except (ElsError, OSError) as error:
        print(f"package_model: {error}", file=sys.stderr)
        return 2
    print(f"written: {options.out}, {size_of(options.out):,} bytes")
    return 0


def pack(trained: Path, out: Path, calibrated: Path | None = None) -> None:
    """Write the packaged folder.

    Raises:
        LoadError: A file of the folders is missing or invalid.
        InvalidArgumentError: The run is not finished or lacks source and licence, the calibration
            is of another network, the folder is too large, or ``out`` exists.
    """
    record = _read(trained / RECORD_FILE)
    _check(record, trained, calibrated)
    if out.exists():
        raise InvalidArgumentError("out", "a folder that does not exist", out)
    dtype = _save(trained, out)
    record["command"] = public(record["command"])
    _write(out / RECORD_FILE, record)
    for name in (LOG_FILE, PLOT_FILE):
        if (trained / name).exists():
            shutil.copyfile(trained / name, out / name)
    if calibrated is not None:
        shutil.copyfile(calibrated / WINDOWS_FILE, out / WINDOWS_FILE)
        calibration = _read(calibrated / CALIBRATION_FILE)
        calibration["command"] = public(calibration["command"])
        # In float16 the fingerprint of the weights file differs.
        calibration["network"]["fingerprint"] = _digest(out / WEIGHTS_FILE)
        _write(out / CALIBRATION_FILE, calibration)
    (out / CARD_FILE).write_text(card(out.name, record, dtype, calibrated is not None))
    if size_of(out) > MOST_BYTES:
        shutil.rmtree(out)
        raise InvalidArgumentError("size", f"at most {MOST_BYTES:,} bytes", trained)


def size_of(folder: Path) -> int:
    """Return the bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def public(command: str) -> str:
    """Return a command with paths reduced to their last part."""
    return shlex.join(map(_public, shlex.split(command)))


def _public(argument: str) -> str:
    option, equals, value = argument.rpartition("=")
    path = Path(value)
    local = path.is_absolute() or path.parts[:1] in ((".",), ("..",), ("~",))
    return f"{option}{equals}{path.name}" if local else argument


def card(name: str, record: dict[str, Any], dtype: torch.dtype, has_windows: bool) -> str:
    """Return the model card in Markdown."""
    settings, data = record["settings"], record["data"]
    network = settings["network"]
    labels = f"{network['label_count']} labels" if network["label_count"] else "no labels"
    channels, height, width = network["shape"]
    lines = [
        f"# {name}",
        "",
        f"A {network['architecture']} of widths {', '.join(map(str, network['widths']))}, padding "
        f"{network['padding']}, {labels}, for images of {channels}×{height}×{width}: "
        f"{record['parameters']:,} parameters in {str(dtype).removeprefix('torch.')}.",
        "",
        f"Trained by els-denoise on {data['images']:,} images of {data['source']}. "
        f"Licence of the images: {data['licence']}. "
        "The weights are under the project's licence, MIT.",
        "",
        "```sh",
        record["command"],
        "```",
        "",
        f"- seed {settings['seed']}, {record['steps']:,} steps, {record['seconds'] / 60:.0f} "
        f"minutes on {record['device']} with {record['threads']} threads, "
        f"torch {record['versions']['torch']}; last loss {record['loss']:.4f}",
        f"- data fingerprint `{data['fingerprint']}`",
        f"- `{RECORD_FILE}` is the record, `{LOG_FILE}` the log, `{PLOT_FILE}` its picture",
    ]
    if has_windows:
        lines.append(
            f"- `{WINDOWS_FILE}`: the windows of ELS calibrated to it (`calibration.json`)"
        )
    return "\n".join(lines) + "\n"


def _check(record: dict[str, Any], trained: Path, calibrated: Path | None) -> None:
    if record["step"] != record["steps"]:
        raise InvalidArgumentError("step", f"{record['steps']}, a finished run", record["step"])
    for name in ("source", "licence"):
        if not record["data"][name]:
            raise InvalidArgumentError(f"data.{name}", f"a run with --{name}", "none")
    if calibrated is not None:
        digest = _digest(trained / WEIGHTS_FILE)
        found = _read(calibrated / CALIBRATION_FILE)["network"]["fingerprint"]
        if found != digest:
            raise InvalidArgumentError("windows", f"those of the network {digest}", found)


def _save(trained: Path, out: Path) -> torch.dtype:
    """Write document and weights; return the precision of the weights."""
    path = trained / MODEL_FILE
    document = parse_network(yaml.safe_load(path.read_bytes()), path)
    expected = build_network(document.config, "meta").state_dict()
    tensors = read_weights(trained / WEIGHTS_FILE, expected)
    save_network_folder(out, document, tensors, torch.float16)
    config = document.config
    times = np.linspace(0.05, 1, 20)
    x = torch.randn(len(times), *config.shape, generator=torch.Generator().manual_seed(0))
    labels = [i % config.label_count for i in range(len(times))] if config.label_count else ()
    query = make_query(x, from_time(times), labels)
    whole = load_network_folder(trained).denoise(query).pixels
    try:
        half = load_network_folder(out).denoise(query).pixels
    except LoadError:  # a weight exceeds float16
        half = np.full_like(whole, np.inf)
    moved = np.linalg.norm((half - whole).reshape(len(x), -1), axis=1)
    if (moved <= _HALF_BUDGET * np.linalg.norm(whole.reshape(len(x), -1), axis=1)).all():
        return torch.float16
    save_network_folder(out, document, tensors)
    return torch.float32


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise LoadError(path, f"expected a record: {error}") from error
    return content


def _write(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
