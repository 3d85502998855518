"""A load through the public client, with retries and resume; every result is checked."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.service.messages import EXPECTED, MODEL, SIGMA, X
from els_client import AsyncClient, ElsError

_DEADLINE_S = 30.0
_AFTER_S = 2.0
"""Seconds for which a load continues after an event, to observe its effects."""


@dataclass(frozen=True)
class Call:
    """One call: its scheduled start (``time.monotonic``) and its outcome."""

    at_s: float
    latency_s: float
    error: str
    """Empty if the result is correct."""


class Load:
    """Calls of an open loop."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._tasks: set[asyncio.Task[None]] = set()
        self.calls: list[Call] = []

    async def offer(self, rate_per_s: float, seed: int = 0) -> None:
        """Start calls at random times (a Poisson process), independent of earlier ones."""
        source, at = random.Random(seed), time.monotonic()
        while True:
            at += source.expovariate(rate_per_s)
            await asyncio.sleep(at - time.monotonic())
            task = asyncio.create_task(self._call(at))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def settle(self) -> None:
        """Wait for calls in flight."""
        await asyncio.gather(*self._tasks)

    async def _call(self, at_s: float) -> None:
        error = await fault_of_call(self._client)
        self.calls.append(Call(at_s, time.monotonic() - at_s, error))

    def failures(self) -> list[str]:
        """Return the errors of failed calls."""
        return [call.error for call in self.calls if call.error]


async def fault_of_call(client: AsyncClient) -> str:
    """Make one call and return its fault; empty if the result is correct."""
    try:
        answer = await client.denoise(X, model=MODEL, sigma=SIGMA)
    except ElsError as error:
        return f"{error.code}: {error}"
    return "" if np.allclose(answer, EXPECTED) else "WRONG"


@asynccontextmanager
async def offered(target: str, rate_per_s: float) -> AsyncIterator[Load]:
    """Yield a load that runs until the block ends, and wait for its calls in flight."""
    async with AsyncClient(target, timeout_s=_DEADLINE_S) as client:
        load = Load(client)
        arrivals = asyncio.create_task(load.offer(rate_per_s))
        try:
            yield load
        finally:
            arrivals.cancel()
            await asyncio.gather(arrivals, return_exceptions=True)
        await load.settle()


async def capacity_per_s(target: str, *, callers: int, seconds: float) -> float:
    """Return the calls per second of a closed loop.

    Raises:
        RuntimeError: A call failed.
    """
    async with AsyncClient(target, timeout_s=_DEADLINE_S) as client:
        await asyncio.gather(*(fault_of_call(client) for _ in range(callers)))
        end = time.monotonic() + seconds

        async def caller() -> int:
            count = 0
            while time.monotonic() < end:
                if error := await fault_of_call(client):
                    raise RuntimeError(error)
                count += 1
            return count

        return sum(await asyncio.gather(*(caller() for _ in range(callers)))) / seconds


def percentile_ms(calls: Sequence[Call], percent: float, begin_s: float, end_s: float) -> float:
    """Return a percentile of the latencies of calls that were to start in [begin, end), in ms."""
    latencies = [call.latency_s for call in calls if begin_s <= call.at_s < end_s]
    return round(1e3 * float(np.percentile(latencies, percent)), 1) if latencies else 0.0


@dataclass(frozen=True)
class Observed:
    """Observations of callers around an event; times are of ``time.monotonic``."""

    load: Load
    steady_s: float
    began_s: float
    ended_s: float

    def facts(self) -> dict[str, Any]:
        """Return the fields of a record; p99 is over calls scheduled in the period."""
        calls, steady = self.load.calls, (self.began_s - self.steady_s, self.began_s)
        failures = self.load.failures()
        return {
            "calls": len(calls),
            "failed": len(failures),
            "errors": dict(Counter(failures)),
            "event_s": round(self.ended_s - self.began_s, 1),
            "steady_p50_ms": percentile_ms(calls, 50, *steady),
            "steady_p99_ms": percentile_ms(calls, 99, *steady),
            "event_p99_ms": percentile_ms(calls, 99, self.began_s, self.ended_s),
            "longest_ms": percentile_ms(calls, 100, 0.0, math.inf),
        }


async def around(
    targets: Mapping[str, str],
    rate_per_s: float,
    event: Callable[[], Awaitable[None]],
    *,
    steady_s: float,
) -> dict[str, Observed]:
    """Return the observations of callers before, during and shortly after an event.

    Args:
        targets: route name → target.
        rate_per_s: calls per second to each target.
        event: awaited once.
        steady_s: seconds of load before the event.
    """
    async with AsyncExitStack() as stack:
        loads = {
            way: await stack.enter_async_context(offered(target, rate_per_s))
            for way, target in targets.items()
        }
        await asyncio.sleep(steady_s)
        began_s = time.monotonic()
        await event()
        ended_s = time.monotonic()
        await asyncio.sleep(_AFTER_S)
    return {way: Observed(load, steady_s, began_s, ended_s) for way, load in loads.items()}
