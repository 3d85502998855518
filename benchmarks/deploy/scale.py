"""Throughput of 1, 2 and 3 replicas on this machine, and CPU time of one denoising.

    python -m benchmarks.deploy.scale [--rounds 6] [--seconds 3] [--out FILE]

Throughput is of a trivial model (Gaussian, 12 KB images) under the closed-loop load of ``els
bench``; rounds alternate, a ratio is the median of pairs with its 95 % bootstrap interval. Replicas
and load share the cores, whose number limits the ratio and is in the record. Service times are core
seconds of sequential calls, from the operating system's accounting, so that other processes do not
count; ``benchmarks.deploy.simulate`` uses them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record
from benchmarks.deploy.replicas import Fleet, fleet
from benchmarks.service.messages import MODEL, SIGMA
from benchmarks.service.statistics import ratio_of_pairs
from els_client import Client
from els_client.bench import Plan, Report, run
from els_service.repository import bundled_models

_CALLERS = 16
_PROCESSES = 2
_CALLS = 400
_WARM_UP = 20
_LABEL = 3
"""One class of Fashion-MNIST: 500 images."""
_LEVELS = 101
"""Quantiles in a record, from 0 to 100 %."""


def throughput(behind: Fleet, *, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Return the throughput of the first 1, 2, … replicas, and its ratio to one."""
    counts = range(1, len(behind.replicas) + 1)
    reports: dict[int, list[Report]] = {count: [] for count in counts}
    for number in range(rounds):
        for count in list(counts)[:: 1 if number % 2 == 0 else -1]:
            reports[count].append(run(_plan(behind, count, seconds)))
    rates = {count: [one.throughput_per_s for one in each] for count, each in reports.items()}
    rows = []
    for count, each in reports.items():
        ratio, low, high = ratio_of_pairs(rates[count], rates[1])
        rows.append(
            {
                "part": "throughput",
                "replicas": count,
                "per_s": round(statistics.median(rates[count]), 1),
                "of_one": round(ratio, 3),
                "low": round(low, 3),
                "high": round(high, 3),
                "failed": sum(one.total.calls - one.total.ok for one in each),
                "load_busy_share": round(max(one.generator.busy_share for one in each), 2),
                "rounds": [round(rate, 1) for rate in rates[count]],
            }
        )
    return rows


def _plan(behind: Fleet, count: int, seconds: float) -> Plan:
    addresses = ",".join(f"{one.address}:{behind.port}" for one in behind.replicas[:count])
    return Plan(
        target=f"ipv4:{addresses}",
        model=MODEL,
        callers=_CALLERS,
        processes=_PROCESSES,
        warm_up_s=0.5,
        duration_s=seconds,
    )


def service_times(model: str, models: Path | None, label: int | None) -> dict[str, Any]:
    """Return the core seconds of single denoisings on a separate replica, and of its start."""
    began = time.monotonic()
    with fleet(1, models=models) as behind:
        (replica,) = behind.replicas
        started_s, started_core_s = time.monotonic() - began, replica.core_seconds()
        with Client(f"{replica.address}:{behind.port}") as client:
            shape = client.model(model).shape
            x = np.random.default_rng(0).standard_normal((1, *shape)).astype(np.float32)
            taken = []
            for _ in range(_WARM_UP + _CALLS):
                before = replica.core_seconds()
                client.denoise(x, model=model, sigma=SIGMA, label=-1 if label is None else label)
                taken.append(replica.core_seconds() - before)
    times = np.array(taken[_WARM_UP:])
    return {
        "part": "service time",
        "model": model,
        "calls": _CALLS,
        "mean_core_ms": round(1e3 * float(times.mean()), 4),
        "start_s": round(started_s, 2),
        "start_core_s": round(started_core_s, 2),
        "quantiles_core_ms": np.quantile(1e3 * times, np.linspace(0, 1, _LEVELS)).round(4).tolist(),
    }


def main() -> None:
    """Measure, print, write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=6, help="rounds for every number of replicas")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds of a turn")
    record.add_arguments(parser)
    options = parser.parse_args()
    recorder = record.start("deploy-scale", options)
    with fleet(3) as behind:
        rows = throughput(behind, rounds=options.rounds, seconds=options.seconds)
    rows.append(service_times(MODEL, None, None))
    rows.append(service_times("fashion-els", bundled_models(), _LABEL))
    for row in rows:
        print(
            "  ".join(f"{key} {value}" for key, value in row.items() if key != "quantiles_core_ms")
        )
    print(f"record: {recorder.write(rows)}")


if __name__ == "__main__":
    main()
