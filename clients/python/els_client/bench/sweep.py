"""Sweep of the request rate: ceiling, latency by rate, wait for admission, gain of batching.

One server is loaded three ways, in turn: by one caller (*serial*), by many callers in a closed loop
(*ceiling*), and in open loops at rising rates. Calls of an open loop start at random times that do
not depend on responses (a seeded Poisson process), and their latency counts from the scheduled
start, so calls that a slow server delays are not left out (coordinated omission).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from els_client.bench._run import run
from els_client.bench.plan import Plan
from els_client.bench.report import Report
from els_client.errors import InvalidArgumentError, UnavailableError

SHARES = (0.25, 0.5, 0.75, 0.9, 1.0, 1.25)
"""Rates of a sweep without its own, as shares of the ceiling of the closed loop."""
MAX_RATES = 50
_BUSY = 0.9
_LAG_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Results of a sweep.

    Attributes:
        serial: Load of one caller.
        closed: Load of many callers, each of which calls after each response.
        points: Loads at rates, in their order.
    """

    serial: Report
    closed: Report
    points: Sequence[Report]

    @property
    def ceiling_per_s(self) -> float:
        """Highest rate of successful responses of any load."""
        return max(map(served_per_s, (self.closed, *self.points)))

    @property
    def gain(self) -> float:
        """Ceiling over the rate of one caller: what batches and overlap of calls gain."""
        return self.ceiling_per_s / served_per_s(self.serial)

    def admission_ms(self, point: Report) -> tuple[float, float]:
        """Return median and 99th percentile of the wait for admission, estimated, in ms.

        The time until the first message (of a sample its first step, else the response), less its
        median for one caller, who never waits.
        """
        alone = self.serial.total.first.p50_ms
        first = point.total.first
        return max(0.0, first.p50_ms - alone), max(0.0, first.p99_ms - alone)

    def generator_kept_up(self, point: Report) -> bool:
        """Return whether latencies of a load are the server's rather than the load generator's."""
        generator = point.generator
        late = generator.lag_p99_ms > _LAG_SHARE * max(1.0, point.total.latency.p50_ms)
        return generator.busy_share < _BUSY and not late

    def document(self) -> dict[str, Any]:
        """Return the sweep as JSON: the numbers by rate, and the reports of all loads."""
        return {
            "ceiling_per_s": self.ceiling_per_s,
            "serial_per_s": served_per_s(self.serial),
            "gain": self.gain,
            "first_alone_p50_ms": self.serial.total.first.p50_ms,
            "rates": [self._row(point) for point in self.points],
            "serial": self.serial.document(),
            "closed": self.closed.document(),
            "points": [point.document() for point in self.points],
        }

    def write(self, path: Path) -> None:
        """Write the sweep as JSON."""
        path.write_text(json.dumps(self.document(), indent=1) + "\n", encoding="utf-8")

    def _row(self, point: Report) -> dict[str, Any]:
        latency, (wait_p50, wait_p99) = point.total.latency, self.admission_ms(point)
        return {
            "rate_per_s": point.plan["rate_per_s"],
            "served_per_s": served_per_s(point),
            "failed": point.total.calls - point.total.ok,
            "p50_ms": latency.p50_ms,
            "p99_ms": latency.p99_ms,
            "admission_p50_ms": wait_p50,
            "admission_p99_ms": wait_p99,
            "generator_kept_up": self.generator_kept_up(point),
        }


def sweep(
    plan: Plan,
    rates: Sequence[float] = (),
    progress: Callable[[str], None] = lambda text: None,
) -> Sweep:
    """Run a sweep on a server and return its results.

    Args:
        plan: Closed loop of the ceiling, with its number of callers; kinds of calls, durations and
            seed are those of every load.
        rates: Calls per second of the open loops; by default ``SHARES`` of the ceiling.
        progress: Receives the name of each load as it starts.

    Raises:
        InvalidArgumentError: The plan has no callers, or a rate is not above 0.
        UnavailableError: No call succeeded in a closed loop, so there is no ceiling.
    """
    if plan.callers is None:
        raise InvalidArgumentError("callers: expected a number for the ceiling, got none")
    if len(rates) > MAX_RATES or not all(0 < rate < float("inf") for rate in rates):
        expected = f"at most {MAX_RATES} rates, each more than 0"
        raise InvalidArgumentError(f"rates: expected {expected}, got {[*rates]}")
    progress("one caller")
    alone = dataclasses.replace(plan, name="serial", callers=1, processes=1, connections=1)
    serial = _answered(run(alone))
    progress(f"{plan.callers} callers")
    closed = _answered(run(dataclasses.replace(plan, name="ceiling")))
    points = []
    for rate in rates or [share * served_per_s(closed) for share in SHARES]:
        progress(f"{rate:.3g} calls a second")
        name = f"{rate:.3g}/s"
        points.append(run(dataclasses.replace(plan, name=name, callers=None, rate_per_s=rate)))
    return Sweep(serial=serial, closed=closed, points=points)


def served_per_s(report: Report) -> float:
    """Return successful responses per second, in the measurement or until the last response.

    The higher of the two: trajectories share a server step by step, so beyond its capacity nearly
    all end after the measurement, and responses within it would show less than the server does.
    """
    ends = [second.second + 1.0 for second in report.series if second.ok]
    until_last = report.total.ok / max(report.seconds_counted, *ends[-1:], 1e-9)
    return max(report.throughput_per_s, until_last)


def _answered(report: Report) -> Report:
    if not report.total.ok:
        errors = ", ".join(f"{code} {count}" for code, count in report.total.errors.items())
        expected = f"{report.plan['name']}: expected a successful response"
        raise UnavailableError(f"{expected}, got {errors or 'none'}")
    return report
