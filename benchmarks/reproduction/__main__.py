"""Compares results with published ones, by network and machine, and says which statements hold.

    python -m benchmarks.reproduction FMNIST=DIR/compare.json MNIST=DIR/compare.json …
        [--trained FOLDER] [--earlier FILE.json] [--note TEXT …] [--page docs/claim.md]
        [--out FILE.json]
    python -m benchmarks.reproduction --page docs/claim.md

A comparison is the output of ``els-server compare --protocols paper,ten-steps``; its row is found
by data, architecture, padding and labels. Several of one network, with other machines or one
protocol only, are merged, if number of images and seed are equal. ``--trained`` names a folder of
model folders, whose records of training and calibration go into the record; ``--earlier`` keeps
what an earlier record has of networks and protocols that are not compared again. Writes a dated
record, its tables, and the figure of each network beside them as
``DATE-claim-NETWORK.png``. ``--page`` writes tables, verdicts and figures into a page; without
comparisons, those of the newest record.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.reproduction.page import figure_of, newest, write_page
from benchmarks.reproduction.published import DATA
from benchmarks.reproduction.rows import rows_of, with_earlier
from benchmarks.reproduction.tables import document
from els_service.experiments.comparison.run import FIGURE_FILE
from els_service.repository import bundled_models


def main(arguments: Sequence[str] | None = None) -> None:
    """Write record, tables, figures and page, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("comparisons", nargs="*", type=_comparison, metavar="DATA=FILE")
    parser.add_argument("--trained", action="append", default=[], type=Path, metavar="FOLDER")
    parser.add_argument(
        "--earlier", type=Path, metavar="FILE.json", help="record whose other rows are kept"
    )
    parser.add_argument("--note", action="append", default=[], help="a line below the tables")
    parser.add_argument("--page", type=Path, help="page with a generated part")
    record.add_arguments(parser)
    options = parser.parse_args(arguments)
    if not options.comparisons:
        if options.page is None:
            parser.error("comparisons: expected DATA=FILE, or --page alone, got none")
        write_page(newest(), options.page)
        return
    recorder = record.start("claim", options)
    try:
        pairs = [(data, content) for data, content, _ in options.comparisons]
        rows = list(rows_of(pairs, [*options.trained, bundled_models()]))
        if options.earlier is not None:
            found = json.loads(options.earlier.read_bytes())["rows"]
            rows = with_earlier(rows, found, options.earlier.name)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    path = recorder.write(rows)
    text = document(rows, options.note)
    path.with_suffix(".md").write_text(text)
    # The first comparison of a network has its figure.
    for _, content, file in reversed(options.comparisons):
        figure = file.with_name(FIGURE_FILE)
        if figure.exists():
            shutil.copyfile(figure, figure_of(path, content["network"]["name"]))
    if options.page is not None:
        write_page(path, options.page)
    print(text)


def _comparison(text: str) -> tuple[str, dict[str, Any], Path]:
    data, _, file = text.partition("=")
    if data not in DATA:
        raise argparse.ArgumentTypeError(f"data: expected one of {', '.join(DATA)}, got {data}")
    try:
        content: dict[str, Any] = json.loads(Path(file).read_bytes())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{file}: expected a comparison: {error}") from error
    if not isinstance(content, dict) or content.get("format") != "els-compare-1":
        raise argparse.ArgumentTypeError(f"{file}: expected format els-compare-1")
    return data, content, Path(file)


if __name__ == "__main__":
    main()
