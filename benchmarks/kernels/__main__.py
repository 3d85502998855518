"""Measures patch attention and writes a record.

    python -m benchmarks.kernels [--repeats 3] [--out FILE.json]
    python -m benchmarks.kernels --device cuda --out FILE.json

On a CPU rows come as they are measured: first against the naive form, in time and memory; then the
native kernel alone, in batches, and against its peers in the same run (KeOps too where it is
installed). On a GPU see ``cuda``.
"""

from __future__ import annotations

import argparse
import json
import os
from itertools import chain
from pathlib import Path


def main() -> None:
    """Print every row, then write the record."""
    # Before torch is imported, as the server does: spinning threads starve each other.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from benchmarks import record

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs; the best counts")
    parser.add_argument("--out", type=Path, help="where the record goes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--smoke", action="store_true", help="two tiny GPU cases on a CPU")
    options = parser.parse_args()
    if options.device == "cuda":
        from benchmarks.kernels import cuda

        cuda.run(options.out or Path("kernels-cuda.json"), smoke=options.smoke)
        return
    from benchmarks.kernels import cpu, naive

    rows = []
    for row in chain(naive.rows(options.repeats), cpu.rows(options.repeats)):
        print(json.dumps(row), flush=True)
        rows.append(row)
    print(f"record: {record.write('kernels-cpu', rows, options.out)}")


if __name__ == "__main__":
    main()
