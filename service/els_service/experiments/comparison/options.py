"""Command-line options shared by calibration and comparison."""

from __future__ import annotations

import argparse
from pathlib import Path

from els_service.experiments.command_line import positive
from els_service.repository import bundled_models


def add_shared(parser: argparse.ArgumentParser) -> None:
    """Add the options for bank, models, seed and device."""
    add = parser.add_argument
    add(
        "--bank",
        type=Path,
        required=True,
        metavar="FILE",
        help="images of the machines: a bank, or a data set as for `train`",
    )
    add(
        "--bank-limit",
        type=positive("bank-limit"),
        metavar="N",
        help="maximum number of images, evenly from all labels, the first of each",
    )
    add("--models", type=Path, default=bundled_models(), help="folder of models")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    add("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
