"""Soaks a real server: python -m benchmarks.soak [--minutes 30] [--out FILE].

A server process is loaded by sixteen callers of fifteen kinds: good, hurried, bad, leaving ones,
streams, reconnections, bytes that are no gRPC, reloads. Every few seconds its resident memory, what
its allocators have handed out, open files and threads are read. After the warm-up the robust slopes
(Theil-Sen) of memory, by hour and by the callers' rounds, and the growth of the rest must stay
within the bounds. Exits 1 with the numbers if they do not, or if any caller was treated wrongly, or
the server logged an error or did not end well.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import grpc

from benchmarks import record
from benchmarks.soak import load
from benchmarks.soak.watch import Bounds, Sample, judge
from benchmarks.soak.watch import look as look_at

_ENOUGH = 20
"""Faults after which the rest is not waited for."""


def _start(models: Path, log: Path) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    command = (Path(sys.executable).with_name("els-server"), "run", "--models", models)
    with log.open("wb") as stderr:
        server = subprocess.Popen(
            (*command, "--port=0", "--metrics-port=0", "--threads=1"),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, "ELS_GRACE_S": "0"},
        )
    assert server.stdout is not None
    return server, json.loads(server.stdout.readline())


async def _soak(
    pid: int, ports: dict[str, Any], options: argparse.Namespace
) -> tuple[load.World, list[Sample]]:
    """Return how the callers fared and what the server held meanwhile."""
    target = f"127.0.0.1:{ports['grpc_port']}"
    metrics = f"http://127.0.0.1:{ports['metrics_port']}/metrics"
    stop, samples, began = asyncio.Event(), [], time.monotonic()
    async with grpc.aio.insecure_channel(target) as channel:
        world = load.World(target, metrics, channel)
        callers = asyncio.ensure_future(load.run(world, stop, options.pause_ms / 1e3))
        while (seconds := time.monotonic() - began) < options.minutes * 60:
            page = await asyncio.to_thread(load.scrape, metrics)
            samples.append(look_at(pid, page, seconds, world.answers.total()))
            await asyncio.wait([callers], timeout=options.every)
            if callers.done() or len(world.faults) > _ENOUGH:
                break
        stop.set()
        await callers
    return world, samples


def _errors(log: Path) -> list[str]:
    """Return what the server logged as errors."""
    lines = log.read_text().splitlines()
    return [line for line in lines if json.loads(line)["level"] == "error"]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=2.0, help="seconds between samples")
    parser.add_argument("--pause-ms", type=float, default=50.0, help="longest pause of a caller")
    # After about 140,000 rounds malloc's memory steps up once, by the 1.83 MiB by which CPython's
    # table of interned strings doubles: no leak, though within a short run it looks like one.
    parser.add_argument("--warm-up", type=float, default=0.5, help="fraction that is discarded")
    parser.add_argument("--mib-per-hour", type=float, default=8.0, help="allowed slope of memory")
    parser.add_argument("--noise-mib", type=float, default=2.0, help="allowed whatever the length")
    parser.add_argument("--bytes-per-round", type=float, default=2.0, help="allowed of malloc's")
    parser.add_argument("--malloc-noise-mib", type=float, default=0.3, help="whatever the rounds")
    parser.add_argument("--blocks-per-round", type=float, default=0.01, help="allowed of Python's")
    parser.add_argument("--blocks-noise", type=float, default=2000.0, help="whatever the rounds")
    parser.add_argument("--fds", type=int, default=4, help="allowed growth in open files")
    parser.add_argument("--threads", type=int, default=2, help="allowed growth in threads")
    record.add_arguments(parser)
    return parser.parse_args()


def _run(options: argparse.Namespace) -> tuple[load.World, list[Sample], list[str]]:
    """Return how the callers fared, what the server held, and what it did wrong."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        server, ports = _start(load.write_models(Path(folder) / "models"), log)
        try:
            world, samples = asyncio.run(_soak(server.pid, ports, options))
            server.send_signal(signal.SIGTERM)
            code = server.wait(60)
        finally:
            server.kill()
        wrong = [*world.faults[:_ENOUGH], *_errors(log)[:_ENOUGH]]
    return world, samples, wrong + ([f"the server ended with {code}"] if code else [])


def main() -> None:
    """Soak, print and record the numbers; exit 1 if they are not flat."""
    options = _options()
    recorder = record.start("soak", options)
    bounds = Bounds(**{field.name: getattr(options, field.name) for field in fields(Bounds)})
    world, samples, wrong = _run(options)
    print(*wrong, sep="\n")
    verdict = judge(samples, options.warm_up, bounds)
    row: dict[str, Any] = {
        **asdict(verdict),
        "faults": [*verdict.faults, *wrong],
        "bounds": asdict(bounds),
        "options": {
            "minutes": options.minutes,
            "every_s": options.every,
            "warm_up": options.warm_up,
        },
        "rounds": dict(world.answers),
        "columns": [field.name for field in fields(Sample)],
        "samples": [list(asdict(sample).values()) for sample in samples],
    }
    for name, value in row.items():
        if name not in ("samples", "columns"):
            print(f"{name:>20} {value}")
    print(f"record: {recorder.write([row])}")
    sys.exit(1 if row["faults"] else 0)


if __name__ == "__main__":
    main()
