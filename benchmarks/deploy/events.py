"""What happens to replicas: a rollout, a death, a hang; each while a load goes on."""

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
"""A call that takes longer than this was with a replica that hangs."""
_SAMPLE_S = 120.0
_STEPS = 500
"""More, with a token each, than the buffers between a replica and a caller who waits hold."""
_BEGUN = 5
_SAMPLES = 6
"""To each target, so that every replica has some."""


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


@dataclass
class Death:
    """A replica that is killed outright, and started again on its address.

    Attributes:
        down_s: how long it is away before it is started.
        even_s: how long after it was ready until every replica had its share.
    """

    fleet: Fleet
    down_s: float = 2.0
    even_s: float = math.nan

    async def __call__(self) -> None:
        """Let it happen."""
        victim = self.fleet.replicas[0]
        victim.send(signal.SIGKILL)
        await asyncio.to_thread(victim.wait_ended)
        await asyncio.sleep(self.down_s)
        victim.start()
        await asyncio.to_thread(victim.wait_ready)
        self.even_s = await seconds_until(lambda: is_even(self.fleet), within_s=30.0)


@dataclass
class Hang:
    """A replica that is stopped as a hung one is, and goes on later.

    Attributes:
        stopped_s: for how long.
        at_s: when it was stopped, ``time.monotonic``.
        back_s: how long after it went on until every replica had its share.
    """

    fleet: Fleet
    stopped_s: float = 14.0
    at_s: float = math.nan
    back_s: float = math.nan

    async def __call__(self) -> None:
        """Let it happen."""
        victim = self.fleet.replicas[0]
        victim.send(signal.SIGSTOP)
        try:
            self.at_s = time.monotonic()
            await asyncio.sleep(self.stopped_s)
        finally:
            victim.send(signal.SIGCONT)
        self.back_s = await seconds_until(lambda: is_even(self.fleet), within_s=60.0)

    def out_s(self, load: Load) -> float:
        """Return how long after the stop the last call still waited for the replica."""
        until = self.at_s + self.stopped_s
        waited = [
            c.at_s - self.at_s for c in load.calls if c.latency_s > _STUCK_S and c.at_s < until
        ]
        return max(waited, default=0.0)


async def outlived_by_samples(
    fleet: Fleet, targets: Iterable[str], death: Callable[[], Awaitable[None]]
) -> int:
    """Return how many trajectories a death broke; all end with the bits of one that none broke.

    Each has taken some steps before a replica dies, and takes the rest after.

    Raises:
        RuntimeError: The bits differ, or the death broke none.
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
        # The first is the one that dies: it is to be one that has some.
        await asyncio.to_thread(fleet.replicas.sort, key=Replica.trajectories, reverse=True)
        broken = await asyncio.to_thread(fleet.replicas[0].trajectories)
        await death()
        dead.set()
        ends = await asyncio.gather(*samples)
    if not all(np.array_equal(end.x, whole.x) for end in ends) or not broken:
        raise RuntimeError(f"expected trajectories broken and bits the same, got {broken} broken")
    return broken


def _sample(client: AsyncClient, *, survive_breaks: bool) -> AsyncGenerator[Step, None]:
    return client.sample(model=MODEL, steps=_STEPS, seed=7, want=(), survive_breaks=survive_breaks)


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


def is_even(fleet: Fleet) -> bool:
    """Return whether each replica answers at least half of its equal share, within a second."""
    answered = fleet.answered(_WINDOW_S)
    return all(
        2 * count * len(answered) >= sum(answered.values()) > 0 for count in answered.values()
    )
