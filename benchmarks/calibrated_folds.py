"""Compares machines with and without calibrated folds with a network, on images of another seed.

    python -m benchmarks.calibrated_folds fashion-resnet=FASHION.safetensors \
        mnist-resnet-64=MNIST.safetensors [--images 150]

For each bundled network: ``els-server calibrate --folds`` fits window and fold by level to the
network's trajectories of one seed; then, on trajectories of another seed, which it did not see, the
error of a single step at each level, ‖D - D of the network‖² / ‖D of the network‖², by ELS with
the windows of the same calibration and by ELS with folds, and ``els-server compare`` of both on
whole trajectories. The machines have a part of the bank, the first images of each label. Some six
minutes of two cores for the two networks above.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record
from els_service.denoisers.base import Denoiser, make_query
from els_service.denoisers.levels import Floats
from els_service.experiments.comparison.calibration import Point, trajectory
from els_service.experiments.comparison.machines import build_machines
from els_service.experiments.comparison.sampling import SampleSpec
from els_service.experiments.comparison.subjects import (
    find_windows,
    open_network,
    open_network_and_bank,
)
from els_service.repository import read_folds

MACHINES = ("els", "els+fold")
FITTED, UNSEEN = 1, 0
"""Seeds of the trajectories of calibration, and of those that it does not see."""
_SERVER = Path(sys.executable).with_name("els-server")


@dataclass(frozen=True)
class Plan:
    """Computation for each network.

    Args:
        images: of the bank that answer a query: of one label, for a network with labels.
        samples: trajectories of the calibration.
        count: unseen trajectories.
        steps: of all trajectories.
        folds: ρ to try beside none, as the command takes them.
        windows: candidates, as the command takes them.
    """

    images: int
    samples: int
    count: int
    steps: int
    folds: str
    windows: str


def main(arguments: Sequence[str] | None = None) -> None:
    """Print every row, then write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="+", metavar="NETWORK=BANK", type=_pair)
    parser.add_argument("--images", type=int, default=150, help="of the bank, or of a label")
    parser.add_argument("--samples", type=int, default=4, help="trajectories of the calibration")
    parser.add_argument("--count", type=int, default=16, help="unseen trajectories")
    parser.add_argument("--steps", type=int, default=10, help="of all trajectories")
    parser.add_argument("--folds", default="0.2,0.5,inf", help="ρ beside none")
    parser.add_argument("--windows", default="3,5,7,9,11,13,15,19,23,27", help="candidates")
    record.add_arguments(parser)
    options = parser.parse_args(arguments)
    recorder = record.start("calibrated-folds", options)
    plan = Plan(
        *(options.images, options.samples, options.count, options.steps),
        *(options.folds, options.windows),
    )
    rows = []
    path = Path()
    for network, bank in options.networks:
        for row in measured(network, bank, plan):
            rows.append(row)
            print(json.dumps(row), flush=True)
        # After each: a run that is ended keeps what it measured.
        path = recorder.write(rows)
    print(f"record: {path}")


def _pair(text: str) -> tuple[str, Path]:
    network, _, file = text.partition("=")
    if not Path(file).is_file():
        raise argparse.ArgumentTypeError(f"expected NETWORK=FILE of a bank, got {text}")
    return network, Path(file)


def measured(network: str, bank: Path, plan: Plan) -> Iterator[dict[str, Any]]:
    """Yield the rows of a network: of each level, then of whole trajectories.

    Args:
        network: name of a bundled model, or its folder.
        bank: file of the images.
        plan: how much is computed.
    """
    began = time.perf_counter()
    labels = open_network(network).denoiser.info.label_count
    limit = plan.images * max(1, labels)
    with tempfile.TemporaryDirectory() as folder:
        fitted, compared = Path(folder, "fitted"), Path(folder, "compared")
        common = ("--bank", str(bank), "--bank-limit", str(limit), "--device", "cpu")
        steps = ("--steps", str(plan.steps))
        _run(
            *("calibrate", network, *common, *steps, "--out", str(fitted), "--search", "climb"),
            *("--samples", str(plan.samples), "--seed", str(FITTED)),
            *("--folds", plan.folds, "--windows", plan.windows),
        )
        calibrated = time.perf_counter() - began
        for row in _levels(network, bank, limit, plan, fitted):
            yield {"network": network, **row}
        _run(
            *("compare", "--network", network, *common, *steps, "--out", str(compared)),
            *("--machines", ",".join(MACHINES), "--windows", str(fitted)),
            *("--count", str(plan.count), "--seed", str(UNSEEN)),
        )
        found = json.loads((compared / "compare.json").read_text())
    names = ("median_pearson_r", "pearson_r_interval", "median_explained", "explained_interval")
    figures = {
        machine: {name: one[name] for name in names if name in one}
        for machine, one in found["machines"].items()
    }
    yield {
        "network": network,
        "bank_images": found["bank"]["images"],
        **{name: getattr(plan, name) for name in ("samples", "count", "steps", "folds")},
        "trajectories": figures,
        "calibration_s": round(calibrated, 1),
        "seconds": round(time.perf_counter() - began, 1),
    }


def _run(*words: str) -> None:
    subprocess.run([_SERVER, *words], check=True, stdout=sys.stderr)


def _levels(
    network: str, bank: Path, limit: int, plan: Plan, fitted: Path
) -> Iterator[dict[str, Any]]:
    """Yield window, fold and errors of single steps at each level, from the highest down."""
    trained, images = open_network_and_bank(network, None, bank, limit, "cpu")
    info = trained.denoiser.info
    table, folds = find_windows(trained, str(fitted)), read_folds(fitted / "folds.yaml")
    machines = build_machines(MACHINES, images, info, windows=table)
    how = SampleSpec(UNSEEN, plan.steps, "ddim", info.label_count)
    labels = how.labels(0, plan.count)
    points = trajectory(trained.denoiser, how, plan.count)
    for index, point in reversed(list(enumerate(points))):
        plain, folded = (_errors(machines[name], point, labels) for name in MACHINES)
        yield {
            "sigma": round(folds.sigma[index], 5),
            "window": None if table.table is None else table.table.k[index],
            "fold_window": folds.k[index],
            "fold": folds.rho[index] if np.isfinite(folds.rho[index]) else "inf",
            "error": float(f"{np.median(plain):.4g}"),
            "fold_error": float(f"{np.median(folded):.4g}"),
            "lower": round(1 - float(np.median(folded / plain)), 4),
        }


def _errors(machine: Denoiser, point: Point, labels: Sequence[int]) -> Floats:
    """Return the squared error of D against the network's, relative to its square, [N]."""
    a = float(point.level.a[0])
    answer = machine.denoise(make_query(point.x, point.level, labels)).mean.double()
    want = (point.pull + point.x.double()) / a
    square = (answer - want).square().flatten(1).sum(1) / want.square().flatten(1).sum(1)
    errors: Floats = square.numpy()
    return errors


if __name__ == "__main__":
    main()
