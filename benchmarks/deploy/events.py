"""Events of replicas under load: a rollout, a crash, a hang."""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass

import numpy as np

from benchmarks.deploy.load import Load
from benchmarks.deploy.replicas import Fleet, Replica
from benchmarks.service.messages import MODEL
from els_client import AsyncClient, Step

_POLL_S = 0.1
_WINDOW_S = 1.0
_STUCK_S = 1.0
"""Seconds after which a call is considered to have been sent to the hung replica."""
_SAMPLE_S = 120.0
_STEPS = 500
"""More messages, with a token each, than the buffers between replica and caller hold."""
_BEGUN = 5
_SAMPLES = 6
"""Trajectories to each target, so that every replica has some."""


async def roll(fleet: Fleet) -> None:
    """Replace every replica like a Deployment with maxSurge 1 and maxUnavailable 0.

    The new replica has another address, and is published once it is ready; then the old one is
    removed from the name and receives SIGTERM at the same time.

    Raises:
        RuntimeError: A replica does not start, or exits with a code other than 0.
    """
    for old in list(fleet.replicas):
        new = fleet.add()
        await asyncio.to_thread(new.wait_ready)
        fleet.publish(without=old)
        await _ended(fleet, old)


async def roll_in_place(fleet: Fleet) -> None:
    """Replace every replica by one on the same address, as on bare metal.

    Raises the errors of ``roll``.
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


@dataclass
class Death:
    """A replica is killed and restarted on its address.

    Attributes:
        down_s: seconds until it is restarted.
        even_s: seconds from its readiness until the load is balanced.
    """

    fleet: Fleet
    down_s: float = 2.0
    even_s: float = math.nan

    async def __call__(self) -> None:
        """Run the event."""
        victim = self.fleet.replicas[0]
        victim.send(signal.SIGKILL)
        await asyncio.to_thread(victim.wait_ended)
        await asyncio.sleep(self.down_s)
        victim.start()
        await asyncio.to_thread(victim.wait_ready)
        self.even_s = await seconds_until(lambda: is_even(self.fleet), within_s=30.0)


@dataclass
class Hang:
    """A replica is stopped, like a hung one, and continued later.

    Attributes:
        stopped_s: seconds for which it is stopped.
        at_s: time of the stop, ``time.monotonic``.
        back_s: seconds from its continuation until the load is balanced.
    """

    fleet: Fleet
    stopped_s: float = 14.0
    at_s: float = math.nan
    back_s: float = math.nan

    async def __call__(self) -> None:
        """Run the event."""
        victim = self.fleet.replicas[0]
        victim.send(signal.SIGSTOP)
        try:
            self.at_s = time.monotonic()
            await asyncio.sleep(self.stopped_s)
        finally:
            victim.send(signal.SIGCONT)
        self.back_s = await seconds_until(lambda: is_even(self.fleet), within_s=60.0)

    def out_s(self, load: Load) -> float:
        """Return the seconds from the stop to the start of the last call that waited."""
        until = self.at_s + self.stopped_s
        waited = [
            c.at_s - self.at_s for c in load.calls if c.latency_s > _STUCK_S and c.at_s < until
        ]
        return max(waited, default=0.0)


async def outlived_by_samples(
    fleet: Fleet, targets: Iterable[str], death: Callable[[], Awaitable[None]]
) -> int:
    """Return how many trajectories a crash interrupted; all must end with the same bits.

    Each has taken some steps before a replica crashes, and takes the rest afterwards.

    Raises:
        RuntimeError: The bits differ, or no trajectory was interrupted.
    """
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(AsyncClient(target, timeout_s=_SAMPLE_S))
            for target in targets
        ]
        *_, whole = [step async for step in _sample(clients[0], survive_breaks=False)]
        begun, dead = asyncio.Barrier(1 + _SAMPLES * len(clients)), asyncio.Event()

        async def drawn(client: AsyncClient) -> Step:
            async for step in _sample(client, survive_breaks=True):
                if step.index == _BEGUN:
                    await begun.wait()
                    await dead.wait()
            return step

        samples = [asyncio.create_task(drawn(client)) for client in clients * _SAMPLES]
        await begun.wait()
        # The first replica is the one that crashes: it must have some.
        await asyncio.to_thread(fleet.replicas.sort, key=Replica.trajectories, reverse=True)
        broken = await asyncio.to_thread(fleet.replicas[0].trajectories)
        await death()
        dead.set()
        ends = await asyncio.gather(*samples)
    if not all(np.array_equal(end.x, whole.x) for end in ends) or not broken:
        raise RuntimeError(f"expected interrupted samples with equal bits, got {broken} broken")
    return broken


def _sample(client: AsyncClient, *, survive_breaks: bool) -> AsyncGenerator[Step, None]:
    return client.sample(model=MODEL, steps=_STEPS, seed=7, want=(), survive_breaks=survive_breaks)


async def seconds_until(reached: Callable[[], bool], *, within_s: float) -> float:
    """Return the seconds until ``reached`` returns true; it is called in a thread.

    Raises:
        TimeoutError: It took longer than ``within_s``.
    """
    begin = time.monotonic()
    async with asyncio.timeout(within_s):
        while not await asyncio.to_thread(reached):
            await asyncio.sleep(_POLL_S)
    return time.monotonic() - begin


def is_even(fleet: Fleet) -> bool:
    """Return whether each replica answers at least half of an equal share, within a second."""
    answered = fleet.answered(_WINDOW_S)
    return all(
        2 * count * len(answered) >= sum(answered.values()) > 0 for count in answered.values()
    )
