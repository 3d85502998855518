"""Measures how original samples of the bundled Fashion-MNIST models are, and writes a record.

    python -m benchmarks.originality [--samples 100] [--figure FILE.png] [--sheet FILE.png]
    python -m benchmarks.originality --full FASHION.safetensors MNIST.safetensors [--figure …]

For each model, by its own sources or, if it has none, those of ``fashion-els``, whose bank is the
same: the share of samples that are memorised (gap ratio below 1/3) and eidetic (Carlini ratio below
1), quartiles of every measure, and the time of the reports as a share of that of drawing. One
process serves, labels 0 to 9 in turn. The figure has the histograms of the gap ratio.

With ``--full`` the models are machines of these two banks, which ``els-server bank build`` makes of
the data sets' 60,000 images, and the bundled networks against them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import record
from benchmarks.service.servers import free_port, running
from els_client import Client
from els_service.repository import bundled_models

if TYPE_CHECKING:
    from els_client import Originality

BANK = "fashion-els"
MODELS = ("fashion-ideal", "fashion-els", "fashion-local", "fashion-unet", "fashion-resnet")
LABELS = 10
MEASURES = (
    *("gap_ratio", "carlini_ratio", "largest_share", "sources_of_90", "seams", "clear"),
    *("largest_region", "in_place"),
)
FULL = {
    "fashion-full-ideal": ("ideal", 0),
    "fashion-full-els": ("els", 0),
    "mnist-full-ideal": ("ideal", 1),
    "mnist-full-els": ("els", 1),
}
"""Model of a whole data set → its machine, and which of the two banks."""
FULL_BANKS = {"fashion-unet": "fashion-full-els", "mnist-resnet-64": "mnist-full-els"}
"""Bundled network → the model whose bank it is compared with."""
_BATCH = 10
_ELS = Path(sys.executable).with_name("els")
_SWEPT = ("--seed=0", "--first-image=7", "--label=7", "--steps=10")
_BINS = np.linspace(0, 1, 41)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print every row, then write the record and the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=100, help="of each model")
    parser.add_argument("--steps", type=int, default=20, help="of ddim")
    parser.add_argument("--models", nargs="+", help="in this order; default: all")
    parser.add_argument("--full", type=Path, nargs=2, metavar="FILE", help="banks of whole sets")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="histograms to draw")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="els sweep of one seed")
    record.add_arguments(parser)
    options = parser.parse_args(arguments)
    recorder = record.start("originality", options)
    rows: list[dict[str, Any]] = []
    ratios: dict[str, list[float]] = {}
    path = Path()
    with _models(options.full) as root:
        banks = dict.fromkeys(MODELS, BANK) if root is None else FULL_BANKS
        models = options.models or (MODELS if root is None else [*FULL, *FULL_BANKS])
        for row, found in measured(root, models, banks, options.samples, options.steps):
            print(json.dumps(row), flush=True)
            rows.append(row)
            ratios[row["model"]] = [one.gap_ratio for one in found if one.gap_ratio is not None]
            # After each model: a run that is ended keeps what it measured.
            path = recorder.write(rows)
            if options.figure:
                draw(ratios, options.figure)
    print(f"record: {path}")
    if options.sheet:
        with _served(None) as (port, _):
            target = f"--target=127.0.0.1:{port}"
            subprocess.run([_ELS, target, "sweep", options.sheet, *_SWEPT], check=True)


@contextmanager
def _models(full: Sequence[Path] | None) -> Iterator[Path | None]:
    """Yield a folder of models of whole data sets; None, for the bundled models, without any."""
    if full is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, (machine, bank) in FULL.items():
            (root / name).mkdir()
            text = f"kind: analytic\nmachine: {machine}\nbank: bank.safetensors\n"
            (root / name / "model.yaml").write_text(text)
            os.link(full[bank], root / name / "bank.safetensors")
        for name in FULL_BANKS:
            shutil.copytree(bundled_models() / name, root / name)
        yield root


def measured(
    root: Path | None, models: Sequence[str], banks: Mapping[str, str], samples: int, steps: int
) -> Iterator[tuple[dict[str, Any], list[Originality]]]:
    """Yield a row and the reports of each model.

    Args:
        root: of the models; None for the bundled ones.
        models: names, in this order.
        banks: for a model without sources, the model whose sources it is judged by.
        samples: of each model.
        steps: of ddim.
    """
    with _served(root) as (_, client):
        served = _when_ready(client)
        for model in models:
            if model in served:
                bank = model if client.model(model).has_originality else banks[model]
                yield _row(client, model, bank, samples, steps)


@contextmanager
def _served(root: Path | None) -> Iterator[tuple[int, Client]]:
    """Yield the port of a server of a folder's or the bundled models, and its client."""
    port = free_port()
    own = () if root is None else (f"--models={root}",)
    command = (_ELS.with_name("els-server"), "run", f"--port={port}", "--metrics-port=0", *own)
    with running(command, port), Client(f"127.0.0.1:{port}", timeout_s=3600) as client:
        _when_ready(client)
        yield port, client


def _when_ready(client: Client) -> set[str]:
    deadline = time.monotonic() + 60
    while True:
        try:
            return {model.name for model in client.models()}
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _row(
    client: Client, model: str, bank: str, samples: int, steps: int
) -> tuple[dict[str, Any], list[Originality]]:
    found: list[Originality] = []
    drawing = reporting = 0.0
    labelled = client.model(model).label_count > 0
    for first in range(0, samples, _BATCH):
        count = min(_BATCH, samples - first)
        labels = [(first + i) % LABELS for i in range(count)] if labelled else None
        began = time.perf_counter()
        *_, last = client.sample(
            model=model, count=count, first_image=first, label=labels, steps=steps, want=()
        )
        drawn = time.perf_counter()
        found.extend(client.originality(last.x, model=bank, label=labels))
        drawing += drawn - began
        reporting += time.perf_counter() - drawn
    row: dict[str, Any] = {
        "model": model,
        "bank": bank,
        "bank_images": found[0].bank_images,
        "samples": samples,
        "steps": steps,
        "memorised": sum(bool(one.memorised) for one in found) / samples,
        "eidetic": sum(bool(one.eidetic) for one in found) / samples,
        "copied": sum(bool(one.copied) for one in found) / samples,
        "draw_s": drawing / samples,
        "report_s": reporting / samples,
        "report_share": reporting / drawing,
    }
    for name in MEASURES:
        values = [value for one in found if (value := getattr(one, name)) is not None]
        quartiles = np.quantile(values, [0.25, 0.5, 0.75]) if values else []
        row |= {f"{name}_quartiles": [round(float(value), 4) for value in quartiles]}
    return row, found


def draw(ratios: dict[str, list[float]], path: Path) -> None:
    """Write the histograms of the gap ratio, one below the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 1.1 * len(ratios) + 0.8), layout="constrained")
    axes = figure.subplots(len(ratios), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (model, values) in zip(axes, ratios.items(), strict=True):
        axis.hist(values, _BINS, color="#2f6f9f")
        axis.axvline(1 / 3, color="#b03030", linewidth=1)
        flagged = sum(value < 1 / 3 for value in values)
        axis.set_title(f"{model}: {flagged} of {len(values)} memorised", fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
    axes[-1].set_xlabel("distance of the nearest bank image / of the second nearest", fontsize=9)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
