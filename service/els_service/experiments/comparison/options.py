"""What calibration and comparison share on the command line."""

from __future__ import annotations

import argparse
from pathlib import Path

from els_service.experiments.command_line import positive
from els_service.experiments.comparison.subjects import BUNDLED_MODELS


def add_shared(parser: argparse.ArgumentParser) -> None:
    """Add the options for bank, models, seed and device."""
    add = parser.add_argument
    add(
        "--bank",
        type=Path,
        required=True,
        metavar="FILE",
        help="images that the machines answer from: a bank, or a data set as `train` reads it",
    )
    add(
        "--bank-limit",
        type=positive("bank-limit"),
        metavar="N",
        help="keep at most N of them, the first of each label, as many of each",
    )
    add("--models", type=Path, default=BUNDLED_MODELS, help="folder of served models")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    add("--threads", type=int, default=0, help="of a CPU, 0: as many as torch takes")
