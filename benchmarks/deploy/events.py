"""What happens to replicas: a rollout, a death, a hang; each while a load goes on."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable

from benchmarks.deploy.replicas import Fleet, Replica

_POLL_S = 0.1


async def roll(fleet: Fleet) -> None:
    """Replace every replica as a Deployment does with one more than wanted and none less.

    The successor has another address, and is published once it is ready; only then is the old one
    taken out of the name and told to end, both at once.

    Raises:
        RuntimeError: A replica does not start, or ends with another code than 0.
    """
    for old in list(fleet.replicas):
        new = fleet.add()
        await asyncio.to_thread(new.wait_ready)
        fleet.publish(without=old)
        await _ended(fleet, old)


async def roll_in_place(fleet: Fleet) -> None:
    """Replace every replica by one on the same address, as on machines of one's own.

    Errors are those of ``roll``.
    """
    for old in list(fleet.replicas):
        await _ended(fleet, old, leaves=False)
        old.start()
        await asyncio.to_thread(old.wait_ready)


async def _ended(fleet: Fleet, replica: Replica, *, leaves: bool = True) -> None:
    replica.send(signal.SIGTERM)
    code = await asyncio.to_thread(replica.wait_ended)
    if code:
        raise RuntimeError(f"{replica.address} ended with exit code {code}")
    if leaves:
        fleet.replicas.remove(replica)


async def seconds_until(reached: Callable[[], bool], *, within_s: float) -> float:
    """Return how long it took until ``reached``, which is asked in a thread.

    Raises:
        TimeoutError: It took longer than ``within_s``.
    """
    begin = time.monotonic()
    async with asyncio.timeout(within_s):
        while not await asyncio.to_thread(reached):
            await asyncio.sleep(_POLL_S)
    return time.monotonic() - begin


def is_even(fleet: Fleet, *, window_s: float) -> bool:
    """Return whether each replica answers at least half of its equal share within a window."""
    answered = fleet.answered(window_s)
    return all(2 * count * len(answered) >= sum(answered.values()) > 0 for count in answered.values())
