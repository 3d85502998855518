"""Measures how original samples are, and what a report costs, and writes a record.

    python -m benchmarks.originality [--only cost] [--figure FILE.png] [--sheet FILE.png]
    python -m benchmarks.originality --full FASHION.safetensors MNIST.safetensors --only models cost

``models`` draws 100 samples of each bundled Fashion-MNIST model, labels 0 to 9 in turn: the share
that is memorised (gap ratio below 1/3) and eidetic (Carlini ratio below 1), quartiles of every
measure, and the time of the reports, by the model's own sources or, if it has none, those of
``fashion-els``. The figure has the histograms of the gap ratio, the sheet one seed by ``sweep``.

``cost`` draws one sample without and with its report, in turn, at the default steps: the report's
share of the time of drawing; and, in this process, the seconds a bank pixel and an image that the
scheduler assumes. ``singles`` draws 40 seeds from each of the gallery's photographs (extra
``gallery``) at the default settings of ``els remix``: the share that is not memorised, whose
largest copied region is below half of the picture.

With ``--full`` (``--only models cost``) the models are machines of these two banks, which
``els-server bank build`` makes of the data sets' 60,000 images, and the bundled networks against
them, in parts of their own. Rows of parts that a run leaves out are those of an earlier record of
the same day and commit.

On two cores ``models`` takes about 6 minutes, ``cost`` 2 and ``singles`` 6; with ``--full --steps
10`` ``models`` takes an hour and a half, ``cost`` 12 minutes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.gallery import PHOTOGRAPHS
from benchmarks.originality import cost, models, singles

PARTS = ("models", "cost", "singles")
NAMES = tuple(one.name for one in PHOTOGRAPHS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print every row, then write the record, the figure and the sheet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts")
    parser.add_argument("--samples", type=int, default=100, help="of each model")
    parser.add_argument("--steps", type=int, default=20, help="of ddim, for models")
    parser.add_argument("--models", nargs="+", help="in this order; default: all")
    parser.add_argument("--rounds", type=int, default=9, help="pairs of samples, for cost")
    parser.add_argument("--seeds", type=int, default=40, help="of each photograph, for singles")
    parser.add_argument("--photographs", nargs="+", choices=NAMES, default=NAMES, help="of singles")
    parser.add_argument("--side", type=int, default=96, help="long side of photographs, in pixels")
    parser.add_argument("--full", type=Path, nargs=2, metavar="FILE", help="banks of whole sets")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="histograms to draw")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="els sweep of one seed")
    record.add_arguments(parser)
    options = parser.parse_args(arguments)
    recorder = record.start("originality", options)
    # Those of whole data sets stand beside those of the bundled models.
    names = {part: f"full-{part}" if options.full else part for part in options.only}
    rows = [row for row in recorder.earlier() if row["part"] not in names.values()]
    path = Path()
    for part in options.only:
        for row in _measured(part, options):
            rows.append({"part": names[part], **row})
            print(json.dumps(rows[-1]), flush=True)
            # After each row: a run that is ended keeps what it measured.
            path = recorder.write(rows)
    print(f"record: {path}")
    if options.sheet:
        models.sweep(options.sheet)


def _measured(part: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Return the rows of a part."""
    match part:
        case "models":
            return models.rows(options)
        case "cost":
            return cost.rows(options.full, options.models, options.rounds, options.side)
        case _:
            return singles.rows(options.photographs, options.seeds, options.side)


if __name__ == "__main__":
    main()
