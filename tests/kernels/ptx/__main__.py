"""Interprets the kernels of every case.

    python -m tests.kernels.ptx [--only els-zeros] [--part 1/4] [--fast]

prints one line for each case; the exit code is 1 if an answer exceeds its budget or a fault is
found. All cases take about ten minutes of a core.
"""

from __future__ import annotations

import argparse
import os
import sys
import time


def main() -> int:
    """Run the cases; return 1 if one is wrong."""
    # Before Triton is imported, which would interpret the source instead of compiling it.
    os.environ.pop("TRITON_INTERPRET", None)
    from tests.kernels.ptx.cases import FAST, everything, outcome
    from tests.kernels.ptx.planes import PLANES

    parser = argparse.ArgumentParser(description="Interpret the compiled kernels of every case.")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument(
        "--part", default="1/1", metavar="I/N", help="every N-th case from the I-th on"
    )
    parser.add_argument("--fast", action="store_true", help="only those of the tests")
    options = parser.parse_args()
    wrong = 0
    part, parts = map(int, options.part.split("/"))
    for shape in list(FAST if options.fast else everything())[part - 1 :: parts]:
        if options.only in str(shape):
            began = time.perf_counter()
            found = outcome(shape)
            seconds = time.perf_counter() - began
            print(
                f"{found.shape}: {len(found.launches)} launches, mean within {found.error:.1e}, "
                f"{seconds:.1f} s {found.excess} {found.faults}".rstrip(),
                flush=True,
            )
            wrong += bool(found.excess or found.faults)
    for name, case in PLANES.items():
        if part == parts and not options.fast and options.only in name:
            began = time.perf_counter()
            result = case()
            seconds = time.perf_counter() - began
            print(
                f"{name}: {max(result.errors):.2f} of the budget, {result.new} binaries new, "
                f"{seconds:.1f} s {result.faults}".rstrip(),
                flush=True,
            )
            wrong += bool(result.faults or result.new or max(result.errors) > 1)
    print(f"{wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
