"""Images per second of the service's networks and of plain eager code with the same weights.

    python -m benchmarks.networks [--device cuda] [--only resnet …] [--rounds 9] [--out FILE]

Plain code is separate (``plain``), or that of diffusers and onnxruntime; it has the same images,
levels, labels, weights and threads, and returns D(x) on the CPU too. Results are compared before
timing. Rounds alternate; a rate is the median, a ratio the median of pairs with its 95 % bootstrap
interval. Requires torch, numpy, PyYAML and safetensors; networks left out, for lack of a library, a
file or time, are named in the record.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks import record
from benchmarks.networks import cases
from benchmarks.service.statistics import ratio_of_pairs
from els_service.denoisers.base import Query
from els_service.denoisers.engines.modules import allow_tf32
from els_service.denoisers.networks import Execution

Row = dict[str, Any]
Case = tuple[str, str, Callable[[int], cases.Pair]]
"""Network, how ours is run, and what makes the pair for a batch size."""

LIMIT_MINUTES = 6.0
"""Minutes after which no case starts; with a last one that compiles, a run takes below eight."""
ARCHITECTURES = ("resnet", "unet", "unet-attention")
NETWORKS = (*ARCHITECTURES, "diffusers", "onnx-terrain")
EXECUTIONS = {
    "cpu": (Execution(),),
    "cuda": (
        Execution(precision="bfloat16", compile="cuda-graphs"),
        Execution(precision="tf32", compile="cuda-graphs"),
        Execution(precision="tf32"),
        Execution(),
    ),
}
"""Device → executions, the recommended one first."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""``cpu`` excludes other processes; with one thread only, as waiting threads spin."""
BUDGET = {"float32": 1e-4, "tf32": 1e-2, "bfloat16": 5e-2, "float16": 1e-2}
"""Maximum ‖difference‖/‖plain‖ of D(x); above it nothing is timed."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print each row, write the record."""
    options = _parser().parse_args(arguments)
    if options.clock == "cpu" and (options.device != "cpu" or options.threads != 1):
        raise SystemExit("clock: expected wall, or one thread of a CPU")
    if options.threads:
        torch.set_num_threads(options.threads)
    recorder = record.start(f"networks-{options.device}", options)
    until = time.monotonic() + 60 * options.minutes
    rows = []
    for row in measure(options, until):
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items() if key != "rounds"))
    print(f"record: {recorder.write(rows)}")


def measure(options: argparse.Namespace, until: float) -> Iterator[Row]:
    """Yield a row per network, execution and batch size; ``until`` is of ``time.monotonic``."""
    for name, execution, make in _cases(options.device, options.only, options.widths):
        for batch in options.batches:
            row: Row = {
                "network": name,
                "execution": execution,
                "batch": batch,
                "clock": options.clock,
            }
            if time.monotonic() > until:
                yield row | {"left_out": "no time left"}
                continue
            try:
                pair = make(batch)
            except (ModuleNotFoundError, FileNotFoundError) as error:
                yield row | {"left_out": str(error)}
                continue
            yield row | _facts(options.device) | _timed(pair, batch, execution, options, until)


def _cases(device: str, only: Sequence[str], widths: Sequence[int]) -> Iterator[Case]:
    for execution in EXECUTIONS[device]:
        named = " ".join([execution.precision, execution.compile.replace("none", "eager")])
        for name in (name for name in ARCHITECTURES if name in only):
            yield _paper_case(name, named, execution, device, widths)
    if "diffusers" in only:
        yield "diffusers", "float32 eager", lambda batch: cases.diffusers(device, widths)
    if "onnx-terrain" in only and device == "cpu":
        yield "onnx-terrain", "onnxruntime", lambda batch: cases.terrain()


def _paper_case(
    name: str, named: str, execution: Execution, device: str, widths: Sequence[int]
) -> Case:
    """Return a case of the paper; if compiled, with only the timed bucket."""

    def make(batch: int) -> cases.Pair:
        buckets = () if execution.compile == "none" else (batch,)
        chosen = Execution(
            precision=execution.precision, compile=execution.compile, buckets=buckets
        )
        return cases.paper(name, chosen, device, widths[:1] if name == "resnet" else widths)

    return name, named, make


def _timed(
    pair: cases.Pair, batch: int, execution: str, options: argparse.Namespace, until: float
) -> Row:
    query = pair.query(batch)

    def ours() -> cases.Images:
        return pair.ours.denoise(query).pixels

    def peer() -> cases.Images:
        return pair.peer(query.pixels, query.level, query.labels)

    # Eager code uses TF32 on a GPU by default: its speed is compared, its error is not.
    with allow_tf32(False):
        difference = _difference(ours(), peer())
    budget = BUDGET.get(execution.partition(" ")[0], BUDGET["float32"])
    if not difference <= budget:
        raise SystemExit(f"wrong: {execution} differs by {difference:.2e}, at most {budget:g}")
    clock = CLOCKS[options.clock]
    rates: list[tuple[float, float]] = []
    while len(rates) < options.rounds and (not rates or time.monotonic() < until):
        first, second = (ours, peer) if len(rates) % 2 else (peer, ours)
        found = {turn: _rate(turn, query, options.seconds, clock) for turn in (first, second)}
        rates.append((found[ours], found[peer]))
    ratio, low, high = ratio_of_pairs(*zip(*rates, strict=True))
    mine, theirs = (statistics.median(column) for column in zip(*rates, strict=True))
    return {
        "images_per_s": round(mine, 2),
        "plain_images_per_s": round(theirs, 2),
        "ratio": round(ratio, 3),
        "interval": [round(low, 3), round(high, 3)],
        "difference": float(f"{difference:.2g}"),
        "rounds": [[round(one, 2) for one in pair] for pair in rates],
    }


def _rate(
    turn: Callable[[], cases.Images], query: Query, seconds: float, clock: Callable[[], float]
) -> float:
    """Return images a second over at least so many seconds, whole calls."""
    began, calls = clock(), 0
    while (passed := clock() - began) < seconds or not calls:
        turn()
        calls += 1
    return calls * len(query) / passed


def _difference(got: cases.Images, want: cases.Images) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def _facts(device: str) -> Row:
    if device == "cuda":
        return {"device": torch.cuda.get_device_name()}
    return {"device": "cpu", "threads": torch.get_num_threads()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=tuple(EXECUTIONS), default="cpu", help="where to compute")
    add("--only", nargs="+", choices=NETWORKS, default=NETWORKS, help="networks; by default all")
    add("--batches", nargs="+", type=int, default=(1, 64), metavar="B", help="batch sizes")
    add("--rounds", type=int, default=9, help="alternating rounds of each pair")
    add("--seconds", type=float, default=1.0, help="length of a turn, at least one call")
    add("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: for a busy machine")
    add(
        "--minutes",
        type=float,
        default=LIMIT_MINUTES,
        help="limit; further cases are left out",
    )
    add("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
    add("--widths", nargs="+", type=int, default=(), metavar="W", help="narrower networks")
    record.add_arguments(parser)
    return parser


if __name__ == "__main__":
    main()
