"""Images per second of networks: ours behind the denoiser protocol, beside the libraries' own.

    python -m benchmarks.engines [--only fashion-unet …] [--threads 1 2] [--batches 1 16 64]

Ours has the engine that ``--engine`` names, ``auto`` by default; the libraries are called directly,
with the same weights, images, levels, labels and threads, and return D(x) too. Results are compared
before timing. Rounds alternate; a rate is the median, a ratio the median of pairs of ours and the
best library with its 95 % bootstrap interval. Rows of bfloat16, where the processor has it, and of
trajectories compare ours with its torch engine in float32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import record
from benchmarks.engines.cases import CASES, Ours
from benchmarks.engines.peers import PEERS, Images, Subject
from benchmarks.networks.__main__ import CLOCKS
from benchmarks.service.statistics import ratio_of_pairs
from els_service.denoisers.base import Denoiser, Query, make_query
from els_service.denoisers.engines.options import EngineError
from els_service.denoisers.engines.runtime import Settings
from els_service.denoisers.levels import from_alpha_bar
from els_service.denoisers.noise import seeded_noise
from els_service.denoisers.samplers import SAMPLERS, DenoiseCall, Options

Row = dict[str, Any]
Turn = Callable[[], object]

BUDGET = 1e-4
"""Maximum ‖difference‖/‖plain‖ of D(x) in float32; above it nothing is timed."""
TRAJECTORIES, STEPS = 16, 20


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print each row, and write the record after each."""
    options = _parser().parse_args(arguments)
    if options.clock == "cpu" and list(options.threads) != [1]:
        raise SystemExit("clock: expected wall, or one thread, as waiting threads spin")
    recorder = record.start("engines-cpu", options)
    rows, path = list[Row](), Path()
    for row in measure(options, time.monotonic() + 60 * options.minutes):
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items() if key != "rounds"))
        # After each row: a run that is ended keeps what it measured.
        path = recorder.write(rows)
    print(f"record: {path}")


def measure(options: argparse.Namespace, until: float) -> Iterator[Row]:
    """Yield a row per network, threads and batch size; ``until`` is of ``time.monotonic``."""
    before = torch.get_num_threads()
    try:
        for name in options.only:
            for threads in options.threads:
                torch.set_num_threads(threads)
                row = {"network": name, "threads": threads, "clock": options.clock}
                if time.monotonic() > until:
                    yield row | {"left_out": "no time left"}
                    continue
                subject, ours = CASES[name](options.widths)
                yield from _float32(row, subject, ours, options, until)
                yield from _against_torch(row, ours, options)
    finally:
        torch.set_num_threads(before)


def _float32(
    row: Row, subject: Subject, ours: Ours, options: argparse.Namespace, until: float
) -> Iterator[Row]:
    denoiser = ours(options.engine, "float32")
    info = denoiser.info
    row = row | {"precision": "float32", "engine": info.engine, "reason": info.engine_reason}
    for batch in options.batches:
        if time.monotonic() > until:
            yield row | {"batch": batch, "left_out": "no time left"}
            continue
        asked = query(denoiser, batch)
        turns: dict[str, Callable[[], Images]] = {"ours": partial(_denoise, denoiser, asked)}
        for name in options.peers:
            peer = PEERS[name](subject, batch, row["threads"])
            turns[name] = partial(peer, asked.pixels, asked.level, asked.labels)
        differences = _check(turns)
        rates = _rates(turns, batch, options)
        yield row | {"batch": batch} | _compared(rates, differences)


def _against_torch(row: Row, ours: Ours, options: argparse.Namespace) -> Iterator[Row]:
    """Yield rows of bfloat16 and of trajectories, against the torch engine in float32."""
    today = ours("torch", "float32")
    rivals = {"float32": ours(options.engine, "float32")} if options.sample else {}
    try:
        Settings("bfloat16", row["threads"]).check()
        rivals["bfloat16"] = ours("openvino", "bfloat16")
    except EngineError as error:
        yield row | {"precision": "bfloat16", "left_out": str(error)}
    for precision, denoiser in rivals.items():
        info = denoiser.info
        about = row | {
            "precision": precision,
            "engine": info.engine,
            "error": float(f"{info.precision_error:.2g}"),
        }
        for batch in options.batches if precision == "bfloat16" else ():
            asked = query(denoiser, batch)
            turns: Mapping[str, Turn] = {
                "ours": partial(_denoise, denoiser, asked),
                "torch": partial(_denoise, today, asked),
            }
            yield about | {"batch": batch} | _compared(_rates(turns, batch, options), {})
        if options.sample:
            turns = {
                "ours": partial(sample, denoiser, options.steps),
                "torch": partial(sample, today, options.steps),
            }
            rates = _rates(turns, TRAJECTORIES, options)
            about |= {"trajectories": TRAJECTORIES, "steps": options.steps}
            yield about | _compared(rates, {})


def _denoise(denoiser: Denoiser, asked: Query) -> Images:
    return denoiser.denoise(asked).pixels


def query(denoiser: Denoiser, batch: int) -> Query:
    """Return a query with different images, levels and labels."""
    numbers = np.random.default_rng(0)
    info = denoiser.info
    x = numbers.standard_normal((batch, *info.shape), np.float32)
    level = from_alpha_bar(numbers.uniform(0.01, 0.99, batch))
    count = info.label_count
    return make_query(x, level, numbers.integers(0, count, batch).tolist() if count else ())


def sample(denoiser: Denoiser, steps: int) -> None:
    """Draw trajectories by DDIM, all denoise calls in one batch."""
    info = denoiser.info
    noise = seeded_noise(0, TRAJECTORIES, info.shape)
    trajectory = SAMPLERS["ddim"](noise, Options(steps, schedule=info.levels))
    event = next(trajectory)
    while True:
        answer = None
        if isinstance(event, DenoiseCall):
            labels = [0] * TRAJECTORIES if info.label_count else ()
            asked = make_query(event.x.float(), event.level, labels)
            answer = denoiser.denoise(asked).mean.double()
        try:
            event = trajectory.send(answer)
        except StopIteration:
            return


def _check(turns: Mapping[str, Callable[[], Images]]) -> dict[str, float]:
    """Return name → relative difference from the first peer.

    Raises:
        SystemExit: A result is wrong.
    """
    answers = {name: turn() for name, turn in turns.items()}
    _, (_, want), *_ = answers.items()
    found = {}
    for name, got in answers.items():
        found[name] = float(f"{np.linalg.norm(got - want) / np.linalg.norm(want):.2g}")
        if not found[name] <= BUDGET:
            raise SystemExit(f"wrong: {name} differs by {found[name]:.2e}, at most {BUDGET:g}")
    return found


def _rates(
    turns: Mapping[str, Turn], images: int, options: argparse.Namespace
) -> dict[str, list[float]]:
    """Return name → images a second in each round; the order alternates."""
    clock = CLOCKS[options.clock]
    rates: dict[str, list[float]] = {name: [] for name in turns}
    for turn in turns.values():
        turn()
    for round_ in range(options.rounds):
        names = list(turns)
        for name in names if round_ % 2 else reversed(names):
            began, calls = clock(), 0
            while (passed := clock() - began) < options.seconds or not calls:
                turns[name]()
                calls += 1
            rates[name].append(calls * images / passed)
    return rates


def _compared(rates: Mapping[str, list[float]], differences: Mapping[str, float]) -> Row:
    medians = {name: statistics.median(found) for name, found in rates.items()}
    best = max((name for name in rates if name != "ours"), key=lambda name: medians[name])
    ratio, low, high = ratio_of_pairs(rates["ours"], rates[best])
    return {
        "images_per_s": {name: round(rate, 2) for name, rate in medians.items()},
        "best": best,
        "ratio": round(ratio, 3),
        "interval": [round(low, 3), round(high, 3)],
        **({"differences": dict(differences)} if differences else {}),
        "rounds": {name: [round(one, 2) for one in found] for name, found in rates.items()},
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=tuple(CASES), default=tuple(CASES), help="networks")
    add("--peers", nargs="+", choices=tuple(PEERS), default=tuple(PEERS), help="libraries")
    add("--engine", default="auto", choices=("auto", "torch", "openvino"), help="of ours")
    add("--batches", nargs="+", type=int, default=(1, 16, 64), metavar="B", help="batch sizes")
    add("--threads", nargs="+", type=int, default=(1, 2), metavar="T", help="CPU threads")
    add("--rounds", type=int, default=7, help="alternating rounds")
    add("--seconds", type=float, default=0.5, help="length of a turn, at least one call")
    add("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: for a busy machine")
    add("--minutes", type=float, default=60.0, help="limit; further cases are left out")
    add("--widths", nargs="+", type=int, default=(), metavar="W", help="narrower networks")
    add("--steps", type=int, default=STEPS, help="of a trajectory")
    add("--no-sample", dest="sample", action="store_false", help="without trajectories")
    record.add_arguments(parser)
    return parser


if __name__ == "__main__":
    main()
