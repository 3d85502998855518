"""A rollout under load: nobody's call may fail, and what it costs callers in latency.

    python -m benchmarks.deploy.roll [--ways client envoy] [--share 0.25] [--out FILE]

Three replicas are replaced one by one, once by others with new addresses (as a Deployment does,
one more than wanted and none less), once on their own addresses. p99 during the rollout is judged
(at most twice the steady one) where there are four cores or more: starting takes a core.
"""

from __future__ import annotations

import os
from typing import Any

from benchmarks.deploy import events
from benchmarks.deploy.scenario import Scene, play

_CORES = 4
_P99_RATIO = 2.0


async def by_new_addresses(scene: Scene) -> dict[str, Any]:
    """Return the row of a rollout as a Deployment does it."""
    _, row = await scene.around(lambda: events.roll(scene.fleet))
    return {"rollout": "new addresses", **row, **_verdict(row)}


async def in_place(scene: Scene) -> dict[str, Any]:
    """Return the row of a rollout on the same addresses."""
    _, row = await scene.around(lambda: events.roll_in_place(scene.fleet))
    return {"rollout": "in place", **row, **_verdict(row)}


def _verdict(row: dict[str, Any]) -> dict[str, Any]:
    ratio = row["event_p99_ms"] / row["steady_p99_ms"]
    judged = len(os.sched_getaffinity(0)) >= _CORES
    reached = row["failed"] == 0 and (ratio <= _P99_RATIO or not judged)
    return {"p99_ratio": round(ratio, 2), "p99_judged": judged, "reached": reached}


if __name__ == "__main__":
    play("roll", __doc__, [by_new_addresses, in_place])
