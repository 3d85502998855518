"""Images per second of networks: ours behind the denoiser protocol, beside the libraries' own.

    python -m benchmarks.engines --only fashion-resnet fashion-unet --minutes 15
    python -m benchmarks.engines --only resnet unet diffusers --rounds 3 --seconds .2 --minutes 15

Ours has the engine that ``--engine`` names, ``auto`` by default; the libraries are called directly,
with the same weights, images, levels, labels and threads, and return D(x) too. Results are compared
before timing. Rounds alternate; a rate is the median, a ratio the median of pairs of ours and the
best library with its 95 % bootstrap interval. Rows of bfloat16 and of trajectories compare ours
with its torch engine in float32; a processor without instructions of bfloat16 computes one batch
size in it.

The record is written after each row. A run measures what the record of the same day, commit and
machine lacks: one that was ended, or ran out of minutes, is continued by the same command.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import record
from benchmarks.engines.cases import CASES, Case
from benchmarks.engines.peers import PEERS, Images
from benchmarks.networks.__main__ import CLOCKS
from benchmarks.service.statistics import ratio_of_pairs
from els_service.denoisers.base import Denoiser, Query, make_query
from els_service.denoisers.engines.options import ENGINES, EngineError
from els_service.denoisers.engines.runtime import Settings
from els_service.denoisers.levels import from_alpha_bar
from els_service.denoisers.noise import seeded_noise
from els_service.denoisers.samplers import SAMPLERS, DenoiseCall, Options

Row = dict[str, Any]
Turn = Callable[[], object]

BUDGET = 1e-4
"""Maximum ‖difference‖/‖plain‖ of D(x) in float32; above it nothing is timed."""
TRAJECTORIES, STEPS = 16, 20
BUNDLED = ("fashion-resnet", "fashion-unet")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print each row, and write the record after each."""
    options = _parser().parse_args(arguments)
    if options.clock == "cpu" and list(options.threads) != [1]:
        raise SystemExit("clock: expected wall, or one thread, as waiting threads spin")
    recorder = record.start("engines-cpu", options)
    # Those that were left out are tried again.
    rows, path = [row for row in recorder.earlier() if "left_out" not in row], Path()
    done = {_cell(row) for row in rows}
    for row in measure(options, time.monotonic() + 60 * options.minutes, done):
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items() if key != "rounds"))
        # After each row: a run that is ended keeps what it measured.
        path = recorder.write(rows)
    print(f"record: {path}")


def _cell(row: Row) -> tuple[Any, ...]:
    """Return the case of a row: network, threads, clock, precision and size."""
    return tuple(
        row.get(key)
        for key in ("network", "threads", "clock", "precision", "batch", "trajectories", "steps")
    )


def measure(
    options: argparse.Namespace, until: float, done: Collection[tuple[Any, ...]] = ()
) -> Iterator[Row]:
    """Yield a row per network, threads and batch size.

    Args:
        options: of the command line.
        until: time of ``time.monotonic`` after which cases are left out.
        done: cells that are not measured again.
    """
    before = torch.get_num_threads()
    try:
        for name in options.only:
            subject, load = CASES[name](options.widths)
            for threads in options.threads:
                torch.set_num_threads(threads)
                case = subject, functools.cache(load)
                row = {"network": name, "threads": threads, "clock": options.clock}
                for cell in _cells(row, options):
                    if _cell(cell) in done:
                        continue
                    if time.monotonic() > until:
                        yield cell | {"left_out": "no time left"}
                    elif "trajectories" in cell or cell["precision"] != "float32":
                        yield _against_torch(cell, case, options)
                    else:
                        yield _beside_libraries(cell, case, options)
    finally:
        torch.set_num_threads(before)


def _cells(row: Row, options: argparse.Namespace) -> Iterator[Row]:
    """Yield what is measured of a network with some threads, without results."""
    for batch in options.batches:
        yield row | {"precision": "float32", "batch": batch}
    fast = _has_bfloat16(row["threads"])
    for batch in options.batches if fast else options.batches[:1]:
        yield row | {"precision": "bfloat16", "batch": batch}
    if row["network"] in options.sample:
        for precision in ("float32", "bfloat16") if fast else ("float32",):
            drawn = {"trajectories": TRAJECTORIES, "steps": options.steps}
            yield row | {"precision": precision} | drawn


def _has_bfloat16(threads: int) -> bool:
    try:
        Settings("bfloat16", threads).check()
    except EngineError:
        return False
    return True


def _beside_libraries(cell: Row, case: Case, options: argparse.Namespace) -> Row:
    """Return the row of a batch in float32."""
    subject, ours = case
    denoiser, batch = ours(options.engine, "float32"), cell["batch"]
    asked = query(denoiser, batch)
    turns: dict[str, Callable[[], Images]] = {"ours": partial(_denoise, denoiser, asked)}
    for name in options.peers:
        peer = PEERS[name](subject, batch, cell["threads"])
        turns[name] = partial(peer, asked.pixels, asked.level, asked.labels)
    differences = _check(turns)
    rates = _rates(turns, batch, options)
    return cell | _engine(denoiser) | _compared(rates, differences)


def _against_torch(cell: Row, case: Case, options: argparse.Namespace) -> Row:
    """Return the row of a batch in bfloat16, or of trajectories."""
    _, ours = case
    precision = cell["precision"]
    engine = options.engine
    if precision == "bfloat16":
        engine = "openvino" if _has_bfloat16(cell["threads"]) else "torch"
    denoiser, today = ours(engine, precision), ours("torch", "float32")
    if "trajectories" in cell:
        turns: dict[str, Turn] = {
            name: partial(sample, one, options.steps)
            for name, one in (("ours", denoiser), ("torch", today))
        }
        images = TRAJECTORIES
    else:
        asked, images = query(denoiser, cell["batch"]), cell["batch"]
        turns = {
            "ours": partial(_denoise, denoiser, asked),
            "torch": partial(_denoise, today, asked),
        }
    return cell | _engine(denoiser) | _compared(_rates(turns, images, options), {})


def _engine(denoiser: Denoiser) -> Row:
    info = denoiser.info
    error = float(f"{info.precision_error:.2g}")
    return {"engine": info.engine, "reason": info.engine_reason, "error": error}


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
    add("--engine", default="auto", choices=ENGINES, help="of ours")
    add("--batches", nargs="+", type=int, default=(1, 16, 64), metavar="B", help="batch sizes")
    add("--threads", nargs="+", type=int, default=(1, 2), metavar="T", help="CPU threads")
    add("--rounds", type=int, default=7, help="alternating rounds")
    add("--seconds", type=float, default=0.5, help="length of a turn, at least one call")
    add("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: for a busy machine")
    add("--minutes", type=float, default=60.0, help="limit; further cases are left out")
    add("--widths", nargs="+", type=int, default=(), metavar="W", help="narrower networks")
    add("--steps", type=int, default=STEPS, help="of a trajectory")
    add("--sample", nargs="*", choices=tuple(CASES), default=BUNDLED, help="of trajectories")
    record.add_arguments(parser)
    return parser


if __name__ == "__main__":
    main()
