"""A replica hangs (SIGSTOP) under load: it is soon asked no more, and again once it goes on.

    python -m benchmarks.deploy.hang [--ways client envoy] [--share 0.25] [--out FILE]

``out_s`` is when the last call began that had to wait for it (longer than a second), counted from
the stop; calls that wait are asked of another replica once its connection is given up.
"""

from __future__ import annotations

from typing import Any

from benchmarks.deploy import events
from benchmarks.deploy.scenario import Scene, play

_OUT_S = 10.0


async def hung(scene: Scene) -> dict[str, Any]:
    """Return the row of a hang."""
    hang = events.Hang(scene.fleet)
    observed, row = await scene.around(hang)
    out_s = hang.out_s(observed.load)
    return {
        **row,
        "stopped_s": hang.stopped_s,
        "out_s": round(out_s, 2),
        "back_s": round(hang.back_s, 2),
        "reached": row["failed"] == 0 and out_s <= _OUT_S,
    }


if __name__ == "__main__":
    play("hang", __doc__, [hung])
