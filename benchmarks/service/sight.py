"""What being watched costs a call: unary ``Denoise``, metrics and traces on and off.

    python -m benchmarks.service.sight [--rounds 12] [--seconds 2] [--out FILE]

Four servers, the same but for what they tell: ``blind`` counts nothing and has no lag monitor,
``metrics`` is as shipped, ``traces_1`` and ``traces_100`` also trace one call in a hundred and all
of them, into a collector that throws the spans away. Rounds alternate; a ratio is the median of
pairs with its 95 % bootstrap interval. The collector and the callers share the machine with them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import grpc
import uvloop

from benchmarks import record
from benchmarks.service import load
from benchmarks.service.messages import DENOISE, MODEL, MODEL_YAML, check
from benchmarks.service.overhead import Target
from benchmarks.service.servers import Running, free_port, running
from benchmarks.service.statistics import ratio_of_pairs

_START_S = 60.0
_EXPORT = "opentelemetry.proto.collector.trace.v1.TraceService"
RATIOS = {"metrics": None, "traces_1": 0.01, "traces_100": 1.0}
"""Variant → share of traced calls."""
GOAL = 0.95


def measure(*, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Return one row a variant, with its ratio to ``blind`` in rate and in CPU time a call."""
    with ExitStack() as stack, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        targets = [Target(name, server, DENOISE) for name, server in _start(stack)]
        for target in targets:
            answer = runner.run(load.first_answer(target.server.port, DENOISE, _START_S))
            check(DENOISE, answer, bare=False)
        for number in range(rounds):
            for target in targets if number % 2 == 0 else targets[::-1]:
                runner.run(_turn(target, seconds))
    blind = targets[0]
    return [_row(target, blind) for target in targets]


async def _turn(target: Target, seconds: float) -> None:
    before = target.server.cpu_seconds()
    rate = await load.unary(target.server.port, DENOISE, seconds)
    target.rates.append(rate)
    target.cpu_us.append(1e6 * (target.server.cpu_seconds() - before) / (rate * seconds))


def _row(target: Target, blind: Target) -> dict[str, Any]:
    ratio, low, high = ratio_of_pairs(target.rates, blind.rates)
    cpu, cpu_low, cpu_high = ratio_of_pairs(target.cpu_us, blind.cpu_us)
    return {
        "variant": target.name,
        "per_second": round(statistics.median(target.rates), 1),
        "server_cpu_us": round(statistics.median(target.cpu_us), 1),
        "ratio_to_blind": [round(number, 3) for number in (ratio, low, high)],
        "cpu_ratio_to_blind": [round(number, 3) for number in (cpu, cpu_low, cpu_high)],
        "callers": load.CALLERS,
        "rounds": len(target.rates),
        "reached": ratio >= GOAL,
    }


def _start(stack: ExitStack) -> Iterator[tuple[str, Running]]:
    root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    (root / MODEL).mkdir()
    (root / MODEL / "model.yaml").write_text(MODEL_YAML)
    sink = stack.enter_context(_this("sink"))
    yield "blind", stack.enter_context(_this("blind", str(root)))
    program = Path(sys.executable).with_name("els-server")
    for name, ratio in RATIOS.items():
        port = free_port()
        command = (program, "run", "--models", root, f"--port={port}", "--metrics-port=0")
        variables = {"ELS_TRACES": f"http://127.0.0.1:{sink.port}", "ELS_TRACES_RATIO": str(ratio)}
        environment = {**os.environ, **({} if ratio is None else variables)}
        yield name, stack.enter_context(running([*map(str, command)], port, environment))


@contextmanager
def _this(part: str, *arguments: str) -> Iterator[Running]:
    """Run a part of this module in a process of its own."""
    port = free_port()
    command = (sys.executable, "-m", "benchmarks.service.sight", part, str(port), *arguments)
    with running(command, port) as server:
        yield server


async def _serve_sink(port: int) -> None:
    async def export(request: bytes, context: Any) -> bytes:
        return b""

    server = grpc.aio.server()
    handler: dict[str, Any] = {"Export": grpc.unary_unary_rpc_method_handler(export)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_EXPORT, handler),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


async def _serve_blind(port: int, root: str) -> None:
    from els_service.config import Settings
    from els_service.logs import configure
    from els_service.wire import loop_lag, metrics, server

    class Unmoved(metrics.Method):
        def end(self, *arguments: object) -> None: ...

    class Blind(metrics.Metrics):
        def method(self, *arguments: str) -> metrics.Method:
            return Unmoved(*arguments)

        def queued(self, *arguments: object) -> None: ...

        def computed(self, *arguments: object) -> None: ...

        def dropped(self, *arguments: object) -> None: ...

        def launched(self, *arguments: object) -> None: ...

    async def nothing(observe: Callable[[float], None]) -> None: ...

    configure("info")
    settings = Settings(models=Path(root), port=port, metrics_port=0)
    with patch.object(server, "Metrics", Blind), patch.object(loop_lag, "watch", nothing):
        await server.serve(settings, lambda ports: None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, write the record; or serve a part of it."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] in (["sink"], ["blind"]):
        port = int(given[1])
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve_sink(port) if given[0] == "sink" else _serve_blind(port, given[2]))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=12, help="rounds of every variant")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a turn")
    parser.add_argument("--out", type=Path, help="where the record goes")
    options = parser.parse_args(given)
    rows = measure(rounds=options.rounds, seconds=options.seconds)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    print(f"record: {record.write('sight', rows, options.out)}")


if __name__ == "__main__":
    main()
