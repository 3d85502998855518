"""Samples of models, and their originality against a bank."""

from __future__ import annotations

import argparse
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.originality.served import ELS, FULL, FULL_BANKS, full_models, served, serving
from els_client import Client

if TYPE_CHECKING:
    from els_client import Originality

BANK = "fashion-els"
MODELS = ("fashion-ideal", "fashion-els", "fashion-local", "fashion-unet", "fashion-resnet")
LABELS = 10
MEASURES = (
    *("gap_ratio", "carlini_ratio", "largest_share", "sources_of_90", "seams", "clear"),
    *("largest_region", "in_place"),
)
_BATCH = 10
_SWEPT = ("--seed=0", "--first-image=7", "--label=7", "--steps=10")
_BINS = np.linspace(0, 1, 41)


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the row of each model, and draw the figure after each.

    Args:
        options: of the command.
    """
    ratios: dict[str, list[float]] = {}
    with full_models(options.full) as root, served(root) as client:
        banks = dict.fromkeys(MODELS, BANK) if root is None else FULL_BANKS
        known = {model.name for model in client.models()}
        for model in options.models or (MODELS if root is None else [*FULL, *FULL_BANKS]):
            if model not in known:
                continue
            bank = model if client.model(model).has_originality else banks[model]
            row, found = _row(client, model, bank, options.samples, options.steps)
            ratios[model] = [one.gap_ratio for one in found if one.gap_ratio is not None]
            if options.figure:
                draw(ratios, options.figure)
            yield row


def sweep(path: Path) -> None:
    """Write the sheet of one seed of the bundled ELS machine."""
    with serving(None) as target:
        subprocess.run([ELS, f"--target={target}", "sweep", path, *_SWEPT], check=True)


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
