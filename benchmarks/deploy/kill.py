"""A replica is killed (SIGKILL) under load: no call fails, samples resume, load is rebalanced.

    python -m benchmarks.deploy.kill [--ways client envoy] [--share 0.25] [--out FILE]

It is restarted on its address, which stays in the name. Six trajectories are in progress; those of
the killed replica are resumed by others, to the same bits.
"""

from __future__ import annotations

from typing import Any

from benchmarks.deploy import events
from benchmarks.deploy.scenario import Scenario, run_events

_EVEN_S = 5.0


async def killed(scenario: Scenario) -> dict[str, Any]:
    """Return the row of a crash."""
    death = events.Death(scenario.fleet)
    broken = 0

    async def event() -> None:
        nonlocal broken
        broken = await events.outlived_by_samples(scenario.fleet, [scenario.target], death)

    _, row = await scenario.around(event)
    return {
        **row,
        "samples_broken_and_whole": broken,
        "even_again_s": round(death.even_s, 2),
        "reached": row["failed"] == 0 and death.even_s <= _EVEN_S,
    }


if __name__ == "__main__":
    run_events("kill", __doc__, [killed])
