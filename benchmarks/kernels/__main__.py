"""Measures patch attention and writes a record.

    python -m benchmarks.kernels [--repeats 3] [--out FILE.json]
    python -m benchmarks.kernels --device cuda --out FILE.json
    python -m benchmarks.kernels --device cuda --rehearse --out FILE.json
    python -m benchmarks.kernels --errors [--out FILE.json]
    python -m benchmarks.kernels --earlier LIBRARY [--repeats 20] [--out FILE.json]
    python -m benchmarks.kernels --plot RECORD.json

On a CPU rows are printed as they are measured: first time and memory relative to the naive form;
then the native kernel alone, in batches, and other implementations in the same run (KeOps too if
installed). For a GPU see ``cuda``. ``--errors`` measures the error of each implementation against
float64 over noise levels instead, ``--earlier`` the speed against an earlier build of the native
library, for the same calls, by noise level on one thread. Plots are written next to a record if
matplotlib is installed; ``--plot`` redraws them.
"""

from __future__ import annotations

import argparse
import json
import os
from importlib.util import find_spec
from itertools import chain
from pathlib import Path


def main() -> None:
    """Print every row, then write the record."""
    # Before torch is imported, as in the server: spinning threads slow each other down.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from benchmarks import record

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs; the best is used")
    record.add_arguments(parser)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--errors", action="store_true", help="errors against float64, no speeds")
    parser.add_argument("--earlier", type=Path, metavar="LIBRARY", help="an earlier build")
    parser.add_argument("--plot", type=Path, metavar="RECORD", help="only plot a record")
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny cases of --device cuda, interpreted on a CPU"
    )
    options = parser.parse_args()
    path: Path = options.plot or options.out or Path("kernels-cuda.json")
    if options.device == "cuda":
        # Triton, once imported, would interpret the source instead of compiling it.
        os.environ.pop("TRITON_INTERPRET", None)
        from benchmarks.kernels import cuda

        recorder = record.start("kernels-cuda", options)
        cuda.run(path, commit=recorder.commit, rehearse=options.rehearse)
    elif options.earlier is not None:
        from benchmarks.kernels import builds

        recorder = record.start("kernels-builds", options)
        rows = []
        for row in builds.rows(options.earlier, max(2, options.repeats)):
            print(json.dumps(row), flush=True)
            rows.append(row)
        print(f"record: {recorder.write(rows)}")
        return
    elif options.plot is None:
        from benchmarks.kernels import cpu, errors, naive

        recorder = record.start(f"kernels-{'errors' if options.errors else 'cpu'}", options)
        measured = chain(naive.rows(options.repeats), cpu.rows(options.repeats))
        rows = []
        for row in errors.rows() if options.errors else measured:
            print(json.dumps(row), flush=True)
            rows.append(row)
        path = recorder.write(rows)
        print(f"record: {path}")
    if find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed (pip install 'els-denoise[bench]')")
        return
    from benchmarks.kernels import plot

    for picture in plot.draw(path):
        print(f"plot: {picture}")


if __name__ == "__main__":
    main()
