"""CPU seconds of the equivariant machine: the native transforms and those of torch (MKL).

    python -m benchmarks.equivariant [--rounds 9] [--batch 1] [--before CHECKOUT] [--out FILE.json]

Seconds of an image of a batch, 1,000 bank images of noise, a level that is new at every call, one
thread, rounds that take turns. ``--before`` also measures the built checkout of an earlier commit,
in a process of its own. Before anything is timed, both answers are compared.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from els_kernels import GEOMETRIES, PatchAttention

SHAPES = ((1, 28, 28), (3, 32, 32), (3, 64, 64))
GEOMETRY = GEOMETRIES["equivariant", "circular"]
_TOLERANCE = 1e-5


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the record; or, with ``--answer``, time one build for another process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="alternating rounds")
    parser.add_argument("--images", type=int, default=1000, help="images of the bank")
    parser.add_argument("--batch", type=int, default=1, help="images of a query")
    parser.add_argument("--before", type=Path, help="a built checkout of another commit")
    parser.add_argument("--answer", type=int, nargs=3, help=argparse.SUPPRESS)
    record.add_arguments(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.answer:
        answer(tuple(options.answer), options.images, options.batch)
        return
    recorder = record.start("equivariant", options)
    rows = [measured(shape, options) for shape in SHAPES]
    recorder.write(rows)


class Subject:
    """A bank and the images of a query."""

    def __init__(
        self, shape: tuple[int, ...], images: int, batch: int, implementation: str
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        bank = torch.rand((images, *shape), generator=generator) * 2 - 1
        self.x = 0.8 * bank[:batch] + 0.6 * torch.randn((batch, *shape), generator=generator)
        self._attention = PatchAttention(bank, implementation=implementation)
        self._calls = 0

    def seconds(self) -> float:
        """Return the CPU seconds of one of its images, at a level of its own."""
        self._calls += 1
        begin = time.process_time()
        self.mean(0.6 + 1e-4 * self._calls)
        return (time.process_time() - begin) / len(self.x)

    def mean(self, s: float) -> torch.Tensor:
        """Return the mean at a = 0.8 and a noise scale."""
        ones = torch.ones(len(self.x), dtype=torch.float64)
        levels = {"a": 0.8 * ones, "s": s * ones}
        return self._attention(self.x, geometry=GEOMETRY, **levels).mean


def measured(shape: tuple[int, int, int], options: argparse.Namespace) -> dict[str, Any]:
    """Return a row: median CPU milliseconds of an image, and ratios with their ranges."""
    images, batch = options.images, options.batch
    rounds, before = options.rounds, options.before
    ours, torchs = (Subject(shape, images, batch, name) for name in ("native", "torch"))
    error = float((ours.mean(0.6) - torchs.mean(0.6)).abs().max())
    if error > _TOLERANCE:
        raise ValueError(f"{shape}: expected answers within {_TOLERANCE}, got {error:.1e}")
    timed = {"native": ours.seconds, "torch": torchs.seconds}
    with ExitStack() as stack:
        if before is not None:
            timed["before"] = stack.enter_context(another_build(before, shape, images, batch))
        for each in timed.values():
            each()
        found = [{name: each() for name, each in timed.items()} for _ in range(rounds)]
    row: dict[str, Any] = {"shape": list(shape), "images": images, "batch": batch}
    row |= {"rounds": rounds, "error": error}
    for name in timed:
        row[f"{name}_ms"] = statistics.median(1000 * each[name] for each in found)
        if name != "native":
            ratios = sorted(each[name] / each["native"] for each in found)
            row[f"{name}_over_native"] = statistics.median(ratios)
            row[f"{name}_over_native_range"] = [ratios[0], ratios[-1]]
    return row


@contextmanager
def another_build(checkout: Path, shape: tuple[int, ...], images: int, batch: int) -> Iterator[Any]:
    """Yield a function that returns the CPU seconds of an image of another checkout."""
    folders = [checkout / part for part in ("kernels", "service", "clients/python", "proto/python")]
    paths = os.pathsep.join(map(str, [*folders, record.ROOT]))
    program = [sys.executable, "-m", "benchmarks.equivariant"]
    command = [*program, "--images", str(images), "--batch", str(batch)]
    with subprocess.Popen(
        [*command, "--answer", *map(str, shape)],
        env={**os.environ, "PYTHONPATH": paths},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as process:
        asked, answered = process.stdin, process.stdout
        assert asked is not None
        assert answered is not None

        def seconds() -> float:
            print(file=asked)
            return float(answered.readline())

        yield seconds
        asked.close()


def answer(shape: tuple[int, ...], images: int, batch: int) -> None:
    """Print the CPU seconds of an image for every line that is read."""
    subject = Subject(shape, images, batch, "native")
    for _ in sys.stdin:
        print(subject.seconds(), flush=True)


if __name__ == "__main__":
    main()
