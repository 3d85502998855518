"""A replica dies by SIGKILL under load: no call fails, samples go on, traffic is soon even again.

    python -m benchmarks.deploy.kill [--ways client envoy] [--share 0.25] [--out FILE]

It is started again on its address, and stays in the name all the while. Six trajectories are under
way when it dies; those that it had go on elsewhere, to the same bits.
"""

from __future__ import annotations

from typing import Any

from benchmarks.deploy import events
from benchmarks.deploy.scenario import Scene, play

_EVEN_S = 5.0


async def killed(scene: Scene) -> dict[str, Any]:
    """Return the row of a death."""
    death = events.Death(scene.fleet)
    broken = 0

    async def event() -> None:
        nonlocal broken
        broken = await events.outlived_by_samples(scene.fleet, [scene.target], death)

    _, row = await scene.around(event)
    return {
        **row,
        "samples_broken_and_whole": broken,
        "even_again_s": round(death.even_s, 2),
        "reached": row["failed"] == 0 and death.even_s <= _EVEN_S,
    }


if __name__ == "__main__":
    play("kill", __doc__, [killed])
