"""Measures statistics, sources and Jacobian products against a plain denoise and writes a record.

    python -m benchmarks.moments [--rounds 5] [--shapes 100,1,28,28 40,3,32,32] [--out FILE.json]

Per bank, padding and level of the ELS machine with k = 9: seconds of a plain denoise of the native
kernel and, as multiples of it, of the statistics (variance, entropy, largest weight), of the same
with eight sources of each pixel, of all of ``statistics`` with the shares of bank images, and of
``jvp`` and ``vjp``; in one process, alternating, the median of the rounds with its extremes,
denormal numbers flushed to zero. A result that differs from the float64 form on a part of the bank
is not timed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

WINDOW = 9
LEVELS = (0.97, 0.5, 0.1)
PADDINGS = ("circular", "zeros", "valid")
SHAPES = ("100,1,28,28", "40,3,32,32")
TARGETS = {"statistics": 1.25, "sources": 1.6, "jvp": 3.0, "vjp": 3.0}
BUDGET = 1e-4
"""Largest difference from the float64 form, relative to the largest number of a result."""
_CHECKED = 4
"""Images of the bank that results are compared on."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print every row, then write the record."""
    # Before torch is imported, as in the server: spinning threads slow each other down.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from benchmarks import record

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of alternating timed runs")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="N,C,H,W", help="banks")
    record.add_arguments(parser)
    options = parser.parse_args(arguments)
    recorder = record.start("moments", options)
    rows = []
    for row in measured(options.rounds, [_numbers(shape) for shape in options.shapes]):
        print(json.dumps(row), flush=True)
        rows.append(row)
    print(f"record: {recorder.write(rows)}")


def measured(rounds: int, shapes: Sequence[tuple[int, ...]]) -> Iterator[dict[str, Any]]:
    """Yield a row for each bank, padding and level."""
    import torch

    from benchmarks.fold.matmul import picture
    from els_kernels import GEOMETRIES, PatchAttention, PatchMoments

    torch.set_flush_denormal(True)
    for images, channels, height, width in shapes:
        bank = torch.cat([picture(height, width, seed)[:, :channels] for seed in range(images)])
        attention = PatchAttention(bank, implementation="native")
        moments = PatchMoments(attention, bank)
        exact = PatchMoments(attention, bank, implementation="torch")
        generator = torch.Generator().manual_seed(1)
        noise, along = torch.randn(2, *bank[:1].shape, generator=generator)
        for padding in PADDINGS:
            for s in LEVELS:
                a = math.sqrt(1 - s * s)
                x = a * bank[:1].flip(3) + s * noise
                options: dict[str, Any] = {
                    "a": torch.tensor([a]),
                    "s": torch.tensor([s]),
                    "window": torch.tensor([WINDOW]),
                    "geometry": GEOMETRIES["els", padding],
                }
                row: dict[str, Any] = {
                    "bank": [images, channels, height, width],
                    "padding": padding,
                    "window": WINDOW,
                    "s": s,
                    "threads": torch.get_num_threads(),
                    "difference": _difference(moments, exact, x, along, options),
                }
                if row["difference"] > BUDGET:
                    yield {**row, "refused": f"difference above {BUDGET}"}
                else:
                    yield {**row, **_timed(attention, moments, x, along, options, rounds)}


def _timed(
    attention: Any, moments: Any, x: Any, along: Any, options: dict[str, Any], rounds: int
) -> dict[str, Any]:
    """Return seconds of the plain denoise, and multiples of it."""
    work: dict[str, Callable[[], object]] = {
        "plain": lambda: attention(x, **options),
        "statistics": lambda: moments.statistics(x, **options, top=1, shares=False),
        "sources": lambda: moments.statistics(x, **options, top=8, shares=False),
        "all": lambda: moments.statistics(x, **options, top=8),
        "jvp": lambda: moments.jvp(x, along, **options),
        "vjp": lambda: moments.vjp(x, along, **options),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    plain = seconds.pop("plain")
    found: dict[str, Any] = {"plain_s": round(median(plain), 5)}
    for name, took in seconds.items():
        ratios = [one / other for one, other in zip(took, plain, strict=True)]
        found[name] = round(median(ratios), 3)
        found[f"{name}_extremes"] = [round(min(ratios), 3), round(max(ratios), 3)]
    found["within_targets"] = all(found[name] <= target for name, target in TARGETS.items())
    return found


def _difference(moments: Any, exact: Any, x: Any, along: Any, options: dict[str, Any]) -> float:
    """Return the largest relative difference of any result from the float64 form.

    Where one source has all the weight some are nearly 0: a variance is compared with a tenth of a
    pixel's range at least, an entropy with one nat, a product with a tenth of the direction.
    """
    import torch

    few = {**options, "ranges": torch.tensor([[0, _CHECKED]])}

    def results(form: Any) -> list[Any]:
        found = form.statistics(x, **few, top=8)
        products = form.vjp(x, along, **few)[1], form.jvp(x, along, **few)[1]
        return [found.mean, found.variance, found.entropy, found.weights, found.shares, *products]

    sizes = [0.0, 0.1, 1.0, 0.0, 0.0] + [0.1 * float(along.abs().max())] * 2
    return max(
        float((got - want).abs().max()) / max(float(want.abs().max()), size, 1e-6)
        for got, want, size in zip(results(moments), results(exact), sizes, strict=True)
    )


def _numbers(shape: str) -> tuple[int, ...]:
    return tuple(int(number) for number in shape.split(","))


if __name__ == "__main__":
    main()
