"""A replica hangs (SIGSTOP) under load: clients stop using it, and return when it continues.

    python -m benchmarks.deploy.hang [--ways client envoy] [--share 0.25] [--out FILE]

``out_s`` is the start of the last call that waited for it (longer than a second), in seconds from
the stop; waiting calls are retried at another replica once its connection is closed.
"""

from __future__ import annotations

from typing import Any

from benchmarks.deploy import events
from benchmarks.deploy.scenario import Scenario, run_events

_OUT_S = 10.0


async def hung(scenario: Scenario) -> dict[str, Any]:
    """Return the row of a hang."""
    hang = events.Hang(scenario.fleet)
    observed, row = await scenario.around(hang)
    out_s = hang.out_s(observed.load)
    return {
        **row,
        "stopped_s": hang.stopped_s,
        "out_s": round(out_s, 2),
        "back_s": round(hang.back_s, 2),
        "reached": row["failed"] == 0 and out_s <= _OUT_S,
    }


if __name__ == "__main__":
    run_events("hang", __doc__, [hung])
