"""Cost of a call to the server, compared with bare handlers and peers in alternating rounds."""

from __future__ import annotations

import asyncio
import os
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import record
from benchmarks.service import load, messages
from benchmarks.service.messages import (
    DENOISE,
    DENOISE_NEW,
    DENOISE_STREAM,
    ECHO,
    INFER_NEW,
    MODEL_INFER,
    SCORE_NEW,
    STREAM_NEW,
    STREAMED,
    Method,
)
from benchmarks.service.peers import REQUIREMENTS, peer
from benchmarks.service.servers import Running, baselines, els_server
from benchmarks.service.statistics import ratio_of_pairs
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceServicer
from els_service.server.services.denoiser import DenoiserService

STREAMS = DenoiserService.DenoiseStream is not DenoiserServiceServicer.DenoiseStream
"""Whether the server has the streaming method."""

_START_S = 90.0


@dataclass(frozen=True)
class Target:
    """One method of one server, and the results of its rounds."""

    name: str
    server: Running
    method: Method
    version: str = ""
    """Requirements of a peer, or commit of an earlier build."""
    rates: list[float] = field(default_factory=list)
    """Calls per second of each round."""
    cpu_us: list[float] = field(default_factory=list)
    """CPU time of the server's processes per call of each round, in µs."""


UNARY: dict[str, Method] = {
    "denoise": DENOISE,
    "denoise_new": DENOISE_NEW,
    "score_new": SCORE_NEW,
    "infer_new": INFER_NEW,
    "infer": MODEL_INFER,
}
"""Name and method of the unary targets of this build, which an earlier one has, too."""

GOALS: tuple[tuple[str, str, float], ...] = (
    ("denoise", "bare_denoise", 0.80),
    ("denoise", "echo", 0.65),
    ("denoise_new", "bare_denoise", 0.75),
    ("denoise_new", "denoise", 0.0),
    ("score_new", "bare_denoise", 0.0),
    ("infer", "bare_infer", 0.80),
    ("infer_new", "bare_infer", 0.75),
    ("infer_new", "infer", 0.0),
    ("infer", "kserve", 1.3),
    ("infer", "mlserver", 1.6),
    ("infer", "pytriton", 1.6),
    ("stream", "denoise", 1.4),
    ("stream_new", "denoise_new", 1.6),
    ("stream", "bare_stream", 0.0),
    ("bare_stream", "bare_denoise", 0.0),
    *((name, f"earlier_{name}", 1.0) for name in UNARY),
)
"""Rate, the rate that it is compared with, and the minimum ratio; 0 for no goal.

``new`` has another level at every call, ``infer_new`` another id, too.
"""


def measure(
    *, rounds: int, seconds: float, peers: Sequence[str], earlier: Path | None = None
) -> list[dict[str, Any]]:
    """Return a row for each target and each ratio.

    Args:
        rounds: number of rounds; each runs all targets, every other one in reverse order.
        seconds: duration of a target in a round.
        peers: other servers to compare with.
        earlier: ``.venv/bin/els-server`` in the checkout of an earlier build to compare with.
    """
    with ExitStack() as stack, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        targets = _start(stack, peers, earlier)
        runner.run(_warm(targets))
        for number in range(rounds):
            # In alternating order, so that a slow drift affects both sides of a pair.
            for target in targets if number % 2 == 0 else targets[::-1]:
                runner.run(_turn(target, seconds))
    rows = [summary(target, seconds) for target in targets]
    return rows + _ratios({target.name: target for target in targets})


def _start(stack: ExitStack, peers: Sequence[str], earlier: Path | None) -> list[Target]:
    """Start every server; targets that are compared are neighbours."""
    ours, bare = stack.enter_context(els_server()), stack.enter_context(baselines())
    builds = {"": (ours, "")}
    if earlier:
        commit = record.commit_of(earlier.absolute().parents[2])
        builds["earlier_"] = (stack.enter_context(els_server(program=earlier)), commit)

    def unary(*names: str) -> list[Target]:
        return [
            Target(prefix + name, server, UNARY[name], commit)
            for name in names
            for prefix, (server, commit) in builds.items()
        ]

    targets = [Target("echo", bare, ECHO), Target("bare_denoise", bare, DENOISE)]
    targets += unary("denoise", "denoise_new", "score_new")
    if STREAMS:
        targets += [
            Target("stream_new", ours, STREAM_NEW),
            Target("stream", ours, DENOISE_STREAM),
            Target("bare_stream", bare, DENOISE_STREAM),
        ]
    targets += [*unary("infer_new"), Target("bare_infer", bare, MODEL_INFER), *unary("infer")]
    for name in peers:
        server, version = stack.enter_context(peer(name)), " ".join(REQUIREMENTS[name])
        targets.append(Target(name, server, MODEL_INFER, version))
    return targets


async def _warm(targets: Sequence[Target]) -> None:
    """Wait for the first response of each target, and check it."""
    for target in targets:
        ask = load.first_streamed if target.method in STREAMED else load.first_answer
        answer = await ask(target.server.port, target.method, _START_S)
        bare = target.name == "echo" or target.name.startswith("bare")
        messages.check(target.method, answer, bare=bare)


async def _turn(target: Target, seconds: float) -> None:
    loop = load.stream if target.method in STREAMED else load.unary
    before = target.server.cpu_seconds()
    rate = await loop(target.server.port, target.method, seconds)
    cpu = target.server.cpu_seconds() - before
    target.rates.append(rate)
    target.cpu_us.append(1e6 * cpu / (rate * seconds))


def summary(target: Target, seconds: float) -> dict[str, Any]:
    """Return the row of a target."""
    return {
        "target": target.name,
        "version": target.version,
        "per_second": round(statistics.median(target.rates), 1),
        "server_cpu_us": round(statistics.median(target.cpu_us), 1),
        "callers": load.CALLERS,
        "round_s": seconds,
        "rounds": [round(rate, 1) for rate in target.rates],
        "load_average": round(os.getloadavg()[0], 2),
    }


def _ratios(targets: dict[str, Target]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for ours, theirs, goal in GOALS:
        if ours in targets and theirs in targets:
            rows.append(ratio_row(targets[ours], targets[theirs], goal))
    return rows


def ratio_row(ours: Target, theirs: Target, goal: float) -> dict[str, Any]:
    """Return the row of the ratio of two rates."""
    ratio, low, high = ratio_of_pairs(ours.rates, theirs.rates)
    cpu, _, _ = ratio_of_pairs(theirs.cpu_us, ours.cpu_us)
    return {
        "ratio": f"{ours.name} / {theirs.name}",
        "median": round(ratio, 3),
        "low": round(low, 3),
        "high": round(high, 3),
        # Less affected by other processes of the machine.
        "by_server_cpu": round(cpu, 3),
        "goal": goal,
        # Decided by the whole interval.
        "reached": "yes" if low >= goal else "no" if high < goal else "open",
    }
