"""The engine under load: gain from batching, goodput under overload, fair shares.

Each scenario starts a server and loads it from processes of ``els bench``. They share the cores of
the machine, so results are those of server and load together.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch

from benchmarks.service.servers import Running, free_port, running
from benchmarks.service.statistics import ratio_of_pairs
from els_client import Client
from els_client.bench import Plan, Report, run, run_all
from els_client.errors import ElsError
from els_service.denoisers.networks import NetworkConfig, build_network
from els_service.denoisers.networks.config import Execution, NetworkDocument
from els_service.denoisers.networks.folder import save_network_folder

_START_S = 90.0
_CALLERS = 16
_LABEL = 3
"""One class of Fashion-MNIST: 500 images, so that an image takes some tens of milliseconds."""
_ELS = "fashion-els"
_UNET = "small-unet"
_RECOVERED_S = 2.0


@contextmanager
def _server(*options: str | Path) -> Iterator[Running]:
    """Yield a server with default settings after its first response."""
    port = free_port()
    program = Path(sys.executable).with_name("els-server")
    command = (program, "run", f"--port={port}", "--metrics-port=0", *options)
    with running(command, port) as server, Client(f"127.0.0.1:{port}", timeout_s=2.0) as client:
        end = time.monotonic() + _START_S
        while True:
            try:
                client.models()
            except ElsError:
                if time.monotonic() > end:
                    raise
            else:
                yield server
                return


@contextmanager
def _unet() -> Iterator[Path]:
    """Yield a models folder with a small untrained UNet; speed does not depend on the weights."""
    config = NetworkConfig(architecture="unet", shape=(1, 28, 28), widths=(32, 64, 128))
    with tempfile.TemporaryDirectory() as root:
        weights = build_network(config, "cpu").state_dict()
        save_network_folder(
            Path(root) / _UNET, NetworkDocument(config, Execution()), weights, torch.float32
        )
        yield Path(root)


def batching(*, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Return the throughput of 16 callers relative to one, for a small UNet and the ELS machine.

    The ELS machine is bound by arithmetic, so batching cannot gain there, and must not cost.
    """
    rows = []
    with _unet() as models, _server("--models", models) as server:
        base = Plan(target=f"127.0.0.1:{server.port}", model=_UNET, callers=1)
        rows.append(_callers_compared(base, rounds, seconds, goal=1.5))
    with _server() as server:
        base = Plan(target=f"127.0.0.1:{server.port}", model=_ELS, label=_LABEL, callers=1)
        rows.append(_callers_compared(base, rounds, seconds, goal=0.97))
    return rows


def _callers_compared(base: Plan, rounds: int, seconds: float, goal: float) -> dict[str, Any]:
    plans = {
        count: replace(base, callers=count, duration_s=seconds, warm_up_s=0.5)
        for count in (1, _CALLERS)
    }
    rates: dict[int, list[float]] = {count: [] for count in plans}
    for number in range(rounds):
        for count in list(plans)[:: 1 if number % 2 == 0 else -1]:
            rates[count].append(run(plans[count]).throughput_per_s)
    ratio, low, high = ratio_of_pairs(rates[_CALLERS], rates[1])
    return {
        "scenario": "batching",
        "model": base.model,
        "ratio": f"{_CALLERS} callers / 1 caller",
        "median": round(ratio, 3),
        "low": round(low, 3),
        "high": round(high, 3),
        "goal": goal,
        "reached": ratio >= goal,
        "one_per_s": round(statistics.median(rates[1]), 2),
        "many_per_s": round(statistics.median(rates[_CALLERS]), 2),
        "rounds": {str(count): [round(rate, 2) for rate in each] for count, each in rates.items()},
    }


def overload(*, seconds: float, factor: float = 3.0, deadline_s: float = 1.0) -> dict[str, Any]:
    """Return goodput, memory and recovery of an open loop at ``factor`` times the capacity.

    Capacity is the throughput of a closed loop of 16 callers. A light probe runs during the
    overload and after it, and shows when latency is normal again.
    """
    with _server() as server:
        base = Plan(target=f"127.0.0.1:{server.port}", model=_ELS, label=_LABEL, callers=_CALLERS)
        capacity = run(replace(base, duration_s=10.0)).throughput_per_s
        light = replace(base, callers=None, rate_per_s=0.05 * capacity, name="probe", seed=1)
        normal = run(replace(light, duration_s=15.0)).total.latency.p99_ms
        flood = replace(
            base,
            name="flood",
            callers=None,
            rate_per_s=factor * capacity,
            deadline_s=deadline_s,
            duration_s=seconds,
            connections=4,
        )
        probe = replace(light, rate_per_s=max(2.0, 0.05 * capacity), duration_s=seconds + 15)
        with _memory(server) as sizes:
            report, after = run_all([flood, probe])
    # Seconds in which the probe was slower than normal.
    slow = [
        second.second for second in after.series if second.ok and second.max_ms > 2 * normal + 5
    ]
    recovered = max([second - seconds + 1 for second in slow if second >= seconds], default=0)
    settled = sizes[len(sizes) // 3 :]
    return {
        "scenario": "overload",
        "model": base.model,
        "capacity_per_s": round(capacity, 2),
        "offered_per_s": round(factor * capacity, 2),
        "seconds": seconds,
        "deadline_s": deadline_s,
        "goodput_per_s": round(report.goodput_per_s, 2),
        "goodput_of_capacity": round(report.goodput_per_s / capacity, 3),
        "goal": 0.90,
        "reached": report.goodput_per_s >= 0.90 * capacity,
        "late_answers": report.total.late,
        "latest_ms": round(report.total.latest_ms, 1),
        "errors": dict(report.total.errors),
        "latency_ms": _percentiles(report),
        "memory_mib": {
            "before": sizes[0],
            "settled": min(settled),
            "highest": max(settled),
        },
        "normal_p99_ms": round(normal, 1),
        "recovered_s": recovered,
        "recovered": recovered <= _RECOVERED_S,
        "load_generator": {
            "lag_p99_ms": round(report.generator.lag_p99_ms, 2),
            "busy_share": round(report.generator.busy_share, 2),
        },
    }


@dataclass(frozen=True)
class _Fair:
    """Rates of two callers, relative to the capacity."""

    modest: float = 0.2
    flood: float = 2.0


def fairness(*, seconds: float, rounds: int) -> dict[str, Any]:
    """Return by how much a caller raises the p99 latency of another with a tenth of its rate."""
    share = _Fair()
    with _server() as server:
        base = Plan(target=f"127.0.0.1:{server.port}", model=_ELS, label=_LABEL, callers=_CALLERS)
        capacity = run(replace(base, duration_s=10.0)).throughput_per_s
        modest = replace(
            base,
            name="modest",
            callers=None,
            rate_per_s=share.modest * capacity,
            duration_s=seconds,
        )
        flood = replace(
            modest, name="flood", rate_per_s=share.flood * capacity, deadline_s=2.0, seed=2
        )
        alone, beside, floods = [], [], []
        for number in range(rounds):
            seeded = replace(modest, seed=number)
            alone.append(run(seeded))
            both = run_all([seeded, replace(flood, seed=100 + number)])
            beside.append(both[0])
            floods.append(both[1])
    raised, low, high = ratio_of_pairs(
        [report.total.latency.p99_ms for report in beside],
        [report.total.latency.p99_ms for report in alone],
    )
    return {
        "scenario": "fairness",
        "model": base.model,
        "capacity_per_s": round(capacity, 2),
        "modest_per_s": round(share.modest * capacity, 2),
        "flood_per_s": round(share.flood * capacity, 2),
        "p99_alone_ms": round(statistics.median(r.total.latency.p99_ms for r in alone), 1),
        "p99_beside_ms": round(statistics.median(r.total.latency.p99_ms for r in beside), 1),
        "raised": round(raised, 3),
        "low": round(low, 3),
        "high": round(high, 3),
        "goal": 2.0,
        "reached": raised <= 2.0,
        "modest_errors": [dict(report.total.errors) for report in beside],
        "flood_per_s_answered": [round(report.throughput_per_s, 2) for report in floods],
    }


def _percentiles(report: Report) -> dict[str, float]:
    latency = report.total.latency
    return {
        name: round(getattr(latency, name), 1) for name in ("p50_ms", "p90_ms", "p99_ms", "max_ms")
    }


@contextmanager
def _memory(server: Running, every_s: float = 0.5) -> Iterator[list[float]]:
    """Yield the resident memory of a server in MiB, sampled until the block ends."""
    sizes = [_resident(server)]
    done = Event()

    def sample() -> None:
        while not done.wait(every_s):
            sizes.append(_resident(server))

    thread = Thread(target=sample)
    thread.start()
    try:
        yield sizes
    finally:
        done.set()
        thread.join()


def _resident(server: Running) -> float:
    status = Path(f"/proc/{server.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
    return round(int(line.split()[1]) / 1024, 1)
