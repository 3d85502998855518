"""What calibration and comparison share on the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from els_service.denoisers.comparison.subjects import BUNDLED_MODELS, choose_device
from els_service.errors import ElsError, InvalidArgumentError

_REFUSED = 2


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


def positive(field: str) -> Callable[[str], int]:
    """Return a parser of whole numbers above 0."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            message = f"{field}: expected a whole number above 0, got {text}"
            raise argparse.ArgumentTypeError(message)
        return int(text)

    return parse


def prepared_device(options: argparse.Namespace) -> str:
    """Return the device to compute on, with its threads set."""
    if options.threads < 0:
        raise InvalidArgumentError("threads", "0 or more", options.threads)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    return choose_device(options.device)


def refusing(program: str, work: Callable[[], None]) -> int:
    """Do the work; return the exit code: 0, or 2 where something is refused, told on stderr."""
    try:
        work()
    except (ElsError, OSError) as error:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        return _REFUSED
    return 0
