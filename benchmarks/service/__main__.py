"""Our server beside bare handlers and peers, in one run; a dated record comes of it.

    python -m benchmarks.service.peers install
    python -m benchmarks.service [--rounds 12] [--seconds 2] [--peers kserve …] [--out FILE]

Loopback only. One process keeps 16 calls of a 12 KB image in flight over the same raw stub for
every server; rounds alternate, a figure is the median, a ratio the median of pairs with its 95 %
bootstrap interval. Then NVIDIA's ``perf_analyzer``, unmodified, asks us and PyTriton.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import record
from benchmarks.service import overhead, perf_analyzer
from benchmarks.service.peers import installed

PEERS = ("kserve", "mlserver", "pytriton")

_LONG = ("rounds", "table")
"""What is in the record alone."""


def main() -> None:
    """Measure, print a table, write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=12, help="rounds of every target")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a turn")
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS, help="all if not said")
    parser.add_argument("--out", type=Path, help="where the record goes")
    options = parser.parse_args()
    if missing := [name for name in (*options.peers, "perf_analyzer") if not installed(name)]:
        parser.error(f"run python -m benchmarks.service.peers install {' '.join(missing)}")
    rows = overhead.measure(rounds=options.rounds, seconds=options.seconds, peers=options.peers)
    rows += perf_analyzer.measure(seconds=options.seconds, peers=options.peers)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items() if key not in _LONG))
    print(f"record: {record.write('service', rows, options.out)}")


if __name__ == "__main__":
    main()
