"""Compares the server with bare handlers and peers in one run, and writes a dated record.

    python -m benchmarks.service.peers install
    python -m benchmarks.service [--rounds 12] [--seconds 2] [--peers kserve …] [--out FILE]
    python -m benchmarks.service --only overload fairness
    python -m benchmarks.service --only overhead --peers --earlier OTHER/.venv/bin/els-server

Loopback only. One process keeps 16 calls of a 12 KB image in flight over the same raw stub for
every server; rounds alternate, a rate is the median, a ratio the median of pairs with its 95 %
bootstrap interval. Then NVIDIA's ``perf_analyzer``, unmodified, loads the server and PyTriton.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.service import http_cost, loads, overhead, perf_analyzer
from benchmarks.service.peers import installed

PEERS = ("kserve", "mlserver", "pytriton")

PARTS = ("overhead", "http", "perf_analyzer", "batching", "overload", "fairness")

_LONG = ("rounds", "table")
"""Columns that are recorded but not printed."""


def main() -> None:
    """Measure, print a table, write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=12, help="rounds of each target")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds of a round")
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS, help="default: all")
    parser.add_argument("--only", nargs="*", default=PARTS, choices=PARTS, help="default: all")
    parser.add_argument(
        "--earlier", type=Path, metavar="ELS-SERVER", help="an earlier build, for 'overhead'"
    )
    parser.add_argument("--overload-seconds", type=float, default=60.0)
    record.add_arguments(parser)
    options = parser.parse_args()
    recorder = record.start("service", options)
    needed = [*options.peers] if "overhead" in options.only else []
    needed += ["perf_analyzer"] if "perf_analyzer" in options.only else []
    if missing := [name for name in needed if not installed(name)]:
        parser.error(f"run python -m benchmarks.service.peers install {' '.join(missing)}")
    rounds, seconds, peers = options.rounds, options.seconds, options.peers
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "overhead": lambda: overhead.measure(
            rounds=rounds, seconds=seconds, peers=peers, earlier=options.earlier
        ),
        "http": lambda: http_cost.measure(rounds=rounds, seconds=seconds),
        "perf_analyzer": lambda: perf_analyzer.measure(seconds=seconds, peers=peers),
        "batching": lambda: loads.batching(rounds=rounds, seconds=seconds),
        "overload": lambda: [loads.overload(seconds=options.overload_seconds)],
        "fairness": lambda: [loads.fairness(seconds=10 * seconds, rounds=max(3, rounds // 4))],
    }
    rows = []
    for part in options.only:
        found = parts[part]()
        rows += found
        for row in found:
            columns = (f"{key} {value}" for key, value in row.items() if key not in _LONG)
            print("  ".join(columns), flush=True)
    print(f"record: {recorder.write(rows)}")


if __name__ == "__main__":
    main()
