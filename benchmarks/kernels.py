"""One step of the ELS machine: our CPU path against the naive unfold-and-softmax form.

    python -m benchmarks.kernels [--images 100] [--repeats 3] [--out FILE]

Every form runs in a process of its own, so that its peak memory can be told; results are compared
before any time is reported.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, unfold

from benchmarks import record
from els_kernels import GEOMETRIES, PatchAttention, count_pairs

GEOMETRY = GEOMETRIES["els", "circular"]
SHAPES = ((1, 28, 28), (3, 32, 32))
WINDOWS = (3, 5, 11, 17)
A, S = 0.8, 0.6
BUDGET = 1e-4
"""‖difference‖/‖naive‖ above which nothing is timed: a speed is told behind a right result only."""


def naive(bank: Tensor) -> Callable[[Tensor, int], Tensor]:
    """Return the textbook form: all patches of the bank at once, one softmax."""

    def step(x: Tensor, k: int) -> Tensor:
        queries = _patches(x, k)[0]
        keys = _patches(bank, k).flatten(0, 1)
        values = bank.flatten(2).transpose(1, 2).flatten(0, 1)
        logits = torch.addmm(keys.square().sum(1) * (-A * A / 2), queries, keys.T, alpha=A)
        return (logits.div_(S * S).softmax(1) @ values).T.view_as(x[0])

    return step


def ours(bank: Tensor) -> Callable[[Tensor, int], Tensor]:
    """Return patch attention as ``auto`` chooses it."""
    attention = PatchAttention(bank)

    def step(x: Tensor, k: int) -> Tensor:
        level = {"a": torch.tensor([A]), "s": torch.tensor([S])}
        return attention(x, **level, window=torch.tensor([k]), geometry=GEOMETRY).mean[0]

    return step


FORMS = {"naive": naive, "ours": ours}


def _patches(images: Tensor, k: int) -> Tensor:
    r = k // 2
    return unfold(pad(images, (r, r, r, r), mode="circular"), k).transpose(1, 2)


def measure(form: str, shape: tuple[int, int, int], k: int, images: int, repeats: int) -> Any:
    """Return the result, the best time in seconds and the peak memory above the bank in bytes."""
    generator = torch.Generator().manual_seed(0)
    bank = torch.rand(images, *shape, generator=generator) * 2 - 1
    x = torch.randn(1, *shape, generator=generator)
    step = FORMS[form](bank)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = step(x, k)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step(x, k)
        times.append(time.perf_counter() - start)
    return result.numpy(), min(times), peak


def _in_process(*arguments: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=_child, args=(there, arguments))
    child.start()
    answer = here.recv()
    child.join()
    return answer


def _child(pipe: Connection, arguments: Any) -> None:
    pipe.send(measure(*arguments))


def main() -> None:
    """Run every shape and window, print a table, write a record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100, help="images in the bank")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs; the best counts")
    parser.add_argument("--out", type=Path, help="where the record goes")
    options = parser.parse_args()
    rows = []
    print(f"{'shape':>12} {'k':>3} {'naive s':>9} {'ours s':>9} {'faster':>7} {'memory':>9}")
    for shape in SHAPES:
        for k in WINDOWS:
            runs = {
                form: _in_process(form, shape, k, options.images, options.repeats) for form in FORMS
            }
            (expected, naive_s, naive_bytes), (got, ours_s, ours_bytes) = runs.values()
            error = float(((got - expected) ** 2).sum() ** 0.5 / (expected**2).sum() ** 0.5)
            if error > BUDGET:
                sys.exit(f"{shape} k={k}: error {error:.1e} over {BUDGET:.0e}; nothing is timed")
            pairs = count_pairs(GEOMETRY, *shape[1:], k) * options.images
            rows.append(
                {
                    "shape": shape,
                    "k": k,
                    "images": options.images,
                    "naive_s": naive_s,
                    "ours_s": ours_s,
                    "speedup": naive_s / ours_s,
                    "naive_bytes": naive_bytes,
                    "ours_bytes": ours_bytes,
                    "memory_ratio": ours_bytes / naive_bytes,
                    "ours_gpairs_per_s": pairs / ours_s / 1e9,
                    "error": error,
                }
            )
            print(
                f"{shape!s:>12} {k:>3} {naive_s:>9.4f} {ours_s:>9.4f} {naive_s / ours_s:>6.1f}x "
                f"1/{naive_bytes / max(1, ours_bytes):.0f}"
            )
    print(f"record: {record.write('kernels', rows, options.out)}")


if __name__ == "__main__":
    main()
