"""Measures the native fold against its matmul form on one colour picture and writes a record.

    python -m benchmarks.fold [--repeats 5] [--size 128 96] [--out FILE.json]

Per window, level and ρ: seconds of the native kernel, of the exact float32 matmul form (unfold,
q·kᵀ, softmax, p·v, fold) at the best of several chunks, and of scaled_dot_product_attention; all in
one process with the same threads, alternating, the fastest of several runs each, denormal numbers
flushed to zero (without it the matmul form is several times slower at s = .3). Errors are those of
the mean relative to its norm, against the matmul form in float64. Wrong results are not timed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

WINDOWS = (7, 9, 15)
LEVELS = (1.0, 0.3, 0.05, 1e-4)
CHUNKS = (64, 128, 256, 512, 1024)
BUDGET = 1e-4
"""Largest error of a result that is timed."""


def main() -> None:
    """Print every row, then write the record."""
    # Before torch is imported, as in the server: spinning threads slow each other down.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from benchmarks import record

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="timed runs; the best is used")
    parser.add_argument("--size", type=int, nargs=2, default=(128, 96), metavar=("H", "W"))
    record.add_arguments(parser)
    options = parser.parse_args()
    recorder = record.start("fold", options)
    rows = []
    for row in measured(options.repeats, tuple(options.size)):
        print(json.dumps(row), flush=True)
        rows.append(row)
    print(f"record: {recorder.write(rows)}")


def measured(repeats: int, size: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """Yield a row for each window, level and ρ."""
    import torch

    from benchmarks.fold.matmul import Problem, picture

    torch.set_flush_denormal(True)
    bank = picture(*size)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(bank.shape, generator=generator)
    for window in WINDOWS:
        for s in LEVELS:
            a = max(1 - s, 1e-4)
            x = a * bank.flip(3) + s * noise
            for rho in (0.2, 0.5, math.inf):
                yield _row(Problem(bank, x, a, s, window, rho), repeats)


def _row(problem: Any, repeats: int) -> dict[str, Any]:
    import torch

    from els_kernels import FOLD_GEOMETRIES, FoldedAttention

    attention = FoldedAttention(problem.bank, implementation="native")

    def native() -> torch.Tensor:
        mean: torch.Tensor = attention(
            problem.x, a=torch.tensor([problem.a]), s=torch.tensor([problem.s]),
            window=torch.tensor([problem.window]), fold=torch.tensor([problem.rho]),
            geometry=FOLD_GEOMETRIES["els", "inside"],
        ).mean  # fmt: skip
        return mean

    exact = problem.matmul(256, torch.float64)
    error = _error(native(), exact)
    row = {
        "window": problem.window,
        "s": problem.s,
        "rho": "inf" if math.isinf(problem.rho) else problem.rho,
        "size": list(problem.x.shape[2:]),
        "threads": torch.get_num_threads(),
        "error": error,
        "error_matmul": _error(problem.matmul(256), exact),
    }
    if error > BUDGET:
        return {**row, "refused": f"error above {BUDGET}"}
    chunk = min(CHUNKS, key=lambda rows: _seconds(lambda: problem.matmul(rows)))
    best = {"native": math.inf, "matmul": math.inf, "sdpa": math.inf}
    work: dict[str, Callable[[], object]] = {
        "native": native,
        "matmul": lambda: problem.matmul(chunk),
        "sdpa": problem.attention,
    }
    for _ in range(repeats):
        for name, run in work.items():
            best[name] = min(best[name], _seconds(run))
    return {
        **row,
        "chunk": chunk,
        **{f"{name}_s": round(seconds, 5) for name, seconds in best.items()},
        "times_faster_than_matmul": round(best["matmul"] / best["native"], 2),
        "times_faster_than_sdpa": round(best["sdpa"] / best["native"], 2),
    }


def _error(got: Any, want: Any) -> float:
    return float((got.double() - want).norm() / want.norm())


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
