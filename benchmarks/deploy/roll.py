"""A rollout under load: no call may fail; the cost in latency is measured.

    python -m benchmarks.deploy.roll [--ways client envoy] [--share 0.25] [--out FILE]

Three replicas are replaced one by one, first by ones with new addresses (like a Deployment with
maxSurge 1 and maxUnavailable 0), then on the same addresses. With four cores or more, p99 during
the rollout must be at most twice the steady one; starting a replica takes a core.
"""

from __future__ import annotations

import os
from typing import Any

from benchmarks.deploy import events
from benchmarks.deploy.scenario import Scenario, run_events

_CORES = 4
_P99_RATIO = 2.0


async def by_new_addresses(scenario: Scenario) -> dict[str, Any]:
    """Return the row of a rollout like that of a Deployment."""
    _, row = await scenario.around(lambda: events.roll(scenario.fleet))
    return {"rollout": "new addresses", **row, **_verdict(row)}


async def in_place(scenario: Scenario) -> dict[str, Any]:
    """Return the row of a rollout on the same addresses."""
    _, row = await scenario.around(lambda: events.roll_in_place(scenario.fleet))
    return {"rollout": "in place", **row, **_verdict(row)}


def _verdict(row: dict[str, Any]) -> dict[str, Any]:
    ratio = row["event_p99_ms"] / row["steady_p99_ms"]
    judged = len(os.sched_getaffinity(0)) >= _CORES
    reached = row["failed"] == 0 and (ratio <= _P99_RATIO or not judged)
    return {"p99_ratio": round(ratio, 2), "p99_judged": judged, "reached": reached}


if __name__ == "__main__":
    run_events("roll", __doc__, [by_new_addresses, in_place])
