"""Cost of metrics and traces for a unary ``Denoise``.

    python -m benchmarks.service.observability_cost [--rounds 30] [--seconds 0.5] [--out FILE]

The servers differ in their telemetry only: ``blind`` counts nothing and has no lag monitor;
``metrics`` has the default settings; ``traces_1`` and ``traces_100`` also trace one call in a
hundred, or all calls, and export the spans to a collector that discards them; ``control`` equals
``blind`` and shows the noise of the measurement. Each round runs all variants in random order; a
ratio is the median over rounds with its 95 % bootstrap interval. Collector and callers run on the
same machine.

A ratio within the control's interval is not significant. On a noisy machine ``handler_us`` is more
accurate: the thread time of the handler alone, from parsing to the response, without gRPC and
without the exporting thread.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import grpc
import uvloop

from benchmarks import record
from benchmarks.service import load
from benchmarks.service.messages import DENOISE, MODEL, MODEL_YAML, Method, check
from benchmarks.service.overhead import Target
from benchmarks.service.servers import Running, free_port, running
from benchmarks.service.statistics import ratio_of_pairs
from els_service.config import Settings
from els_service.logs import configure
from els_service.server import server
from els_service.server.telemetry import metrics, process

_START_S = 60.0
_EXPORT = "opentelemetry.proto.collector.trace.v1.TraceService"
VARIANTS = {"blind": 0.0, "control": 0.0, "metrics": 0.0, "traces_1": 0.01, "traces_100": 1.0}
"""Variant → share of traced calls."""
GOAL = 0.95


class _NoMethod(metrics.Method):
    def end(self, *arguments: object) -> None: ...


class _NoMetrics(metrics.Metrics):
    def method(self, *arguments: str) -> metrics.Method:
        return _NoMethod(*arguments)

    def on_queued(self, *arguments: object) -> None: ...

    def on_computed(self, *arguments: object) -> None: ...

    def on_dropped(self, *arguments: object) -> None: ...

    def on_batch(self, *arguments: object) -> None: ...


@contextmanager
def _observing(variant: str) -> Iterator[None]:
    """Give servers that are constructed in the block the telemetry of a variant."""

    async def nothing(observe: Callable[[float], None]) -> None: ...

    if variant not in ("blind", "control"):
        yield
        return
    with (
        patch.object(server, "Metrics", _NoMetrics),
        patch.object(process, "watch_loop_lag", nothing),
    ):
        yield


def _settings(variant: str, root: Path, port: int, sink: int) -> Settings:
    ratio = VARIANTS[variant]
    traces = f"http://127.0.0.1:{sink}" if ratio else None
    return Settings(models=root, port=port, metrics_port=0, traces=traces, traces_ratio=ratio)


def measure(*, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Return a row for each variant, with its ratios to ``blind``."""
    with ExitStack() as stack, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (root / MODEL).mkdir()
        (root / MODEL / "model.yaml").write_text(MODEL_YAML)
        sink = stack.enter_context(_process("sink"))
        export = Method(f"/{_EXPORT}/Export", (b"",))
        runner.run(load.first_answer(sink.port, export, _START_S))
        handlers = runner.run(_time_handlers(root, sink.port, rounds))
        servers = {
            name: stack.enter_context(_process(name, str(root), str(sink.port)))
            for name in VARIANTS
        }
        for running_server in servers.values():
            answer = runner.run(load.first_answer(running_server.port, DENOISE, _START_S))
            check(DENOISE, answer, bare=False)
        targets = [Target(name, one, DENOISE) for name, one in servers.items()]
        order = random.Random(0)
        for _ in range(rounds):
            for target in order.sample(targets, len(targets)):
                runner.run(_turn(target, seconds))
    return [_row(target, targets[0], handlers) for target in targets[1:]]


async def _turn(target: Target, seconds: float) -> None:
    before = target.server.cpu_seconds()
    rate = await load.unary(target.server.port, DENOISE, seconds)
    target.rates.append(rate)
    target.cpu_us.append(1e6 * (target.server.cpu_seconds() - before) / (rate * seconds))


def _row(target: Target, blind: Target, handlers: dict[str, float]) -> dict[str, Any]:
    ratio, low, high = ratio_of_pairs(target.rates, blind.rates)
    cpu, cpu_low, cpu_high = ratio_of_pairs(target.cpu_us, blind.cpu_us)
    return {
        "variant": target.name,
        "per_second": round(statistics.median(target.rates), 1),
        "blind_per_second": round(statistics.median(blind.rates), 1),
        "ratio_to_blind": [round(number, 3) for number in (ratio, low, high)],
        "server_cpu_us": round(statistics.median(target.cpu_us), 1),
        "cpu_ratio_to_blind": [round(number, 3) for number in (cpu, cpu_low, cpu_high)],
        "handler_us": round(handlers[target.name], 2),
        "blind_handler_us": round(handlers["blind"], 2),
        "callers": load.CALLERS,
        "rounds": len(target.rates),
        "reached": ratio >= GOAL,
    }


class _Context:
    """The part of a call's context that a handler uses."""

    def add_done_callback(self, callback: Callable[[_Context], None]) -> None:
        callback(self)

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return (("user-agent", "grpc-python-asyncio"),)

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def time_remaining(self) -> float:
        return load.CALL_S

    async def read(self) -> bytes:
        return DENOISE.body


class _Handlers:
    """Proxy of a ``grpc.aio.Server`` that records the added handlers."""

    def __init__(self, real: grpc.aio.Server) -> None:
        self._real, self.taken = real, list[Any]()

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        self.taken += handlers
        self._real.add_generic_rpc_handlers(handlers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


async def _time_handlers(root: Path, sink: int, rounds: int) -> dict[str, float]:
    """Return the median thread time of each variant's handler in µs per call."""
    handlers: dict[str, Any] = {}
    servers = []
    details = SimpleNamespace(method=DENOISE.name, invocation_metadata=())
    make = grpc.aio.server
    for variant in VARIANTS:
        taken: list[_Handlers] = []

        def take(*arguments: Any, into: list[_Handlers] = taken, **options: Any) -> _Handlers:
            into.append(_Handlers(make(*arguments, **options)))
            return into[0]

        with _observing(variant), patch.object(grpc.aio, "server", take):
            servers.append(server.Server(_settings(variant, root, 0, sink)))
            await servers[-1].start()
        found = (generic.service(details) for generic in taken[0].taken)
        handlers[variant] = next(handler for handler in found if handler is not None)
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    context, calls = _Context(), 100
    for _ in range(4 * rounds):
        for variant, handler in handlers.items():
            before = time.thread_time()
            for _ in range(calls):
                await handler.stream_unary(None, context)
            times[variant].append(1e6 * (time.thread_time() - before) / calls)
    for one in servers:
        await one.close()
    return {variant: statistics.median(found) for variant, found in times.items()}


@contextmanager
def _process(part: str, *arguments: str) -> Iterator[Running]:
    """Yield a part of this module as a separate process."""
    port = free_port()
    command = (
        sys.executable,
        "-m",
        "benchmarks.service.observability_cost",
        part,
        str(port),
        *arguments,
    )
    with running(command, port) as process:
        yield process


async def _serve_sink(port: int) -> None:
    async def export(request: bytes, context: Any) -> bytes:
        return b""

    sink = grpc.aio.server()
    handler: dict[str, Any] = {"Export": grpc.unary_unary_rpc_method_handler(export)}
    sink.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_EXPORT, handler),))
    sink.add_insecure_port(f"127.0.0.1:{port}")
    await sink.start()
    await sink.wait_for_termination()


async def _serve(variant: str, port: int, root: str, sink: str) -> None:
    configure("info")
    with _observing(variant):
        settings = _settings(variant, Path(root), port, int(sink))
        await server.serve(settings, lambda ports: None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table and write the record; or run a server of the measurement."""
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in ("sink", *VARIANTS):
        part, port, *rest = given
        serving = _serve_sink(int(port)) if part == "sink" else _serve(part, int(port), *rest)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serving)
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30, help="rounds of each variant")
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="seconds of a variant in a round"
    )
    record.add_arguments(parser)
    options = parser.parse_args(given)
    recorder = record.start("observability-cost", options)
    rows = measure(rounds=options.rounds, seconds=options.seconds)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    print(f"record: {recorder.write(rows)}")


if __name__ == "__main__":
    main()
