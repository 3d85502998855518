"""Load process: ``python -m els_client.bench._worker``, with JSON lines on stdin and stdout.

It reads the plan, writes ``ready``, reads the start time (seconds of ``time.monotonic``, which all
processes of a machine share) and writes its results.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import resource
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc

from els_client._channel import channel_options, open_async_channel
from els_client._types import Tls
from els_client.bench._callers import Done, Load, StreamCalls, UnaryCalls
from els_client.bench._requests import prepare
from els_client.bench.plan import Kind, Plan, share
from els_client.bench.tally import Tally

# Maximum calls of an open loop in flight; further ones wait, which counts in their latency.
_MAX_IN_FLIGHT = 4096
_CONNECT_TIMEOUT_S = 10.0


class Transports:
    """The transports of all kinds of call; counts the calls in flight."""

    def __init__(self, load: Load, channels: list[grpc.aio.Channel]) -> None:
        self._load = load
        self._unary = UnaryCalls(load, channels)
        streams = channels if load.plan.stream and "denoise" in load.requests.mix else []
        self._streams = [StreamCalls(load, channel) for channel in streams]
        self._next_stream = 0
        self.in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def submit(self, kind: Kind, intended: float, then: Done) -> None:
        """Start a call; ``then`` is called at its end."""
        self.in_flight += 1
        self._idle.clear()

        def done() -> None:
            self.in_flight -= 1
            then()
            if not self.in_flight:
                self._idle.set()

        self._transport(kind).submit(kind, intended, done)

    def _transport(self, kind: Kind) -> UnaryCalls | StreamCalls:
        if kind != "denoise" or not self._streams:
            return self._unary
        self._next_stream = (self._next_stream + 1) % len(self._streams)
        return self._streams[self._next_stream]

    async def drain(self, timeout_s: float) -> None:
        """Wait for calls in flight, then cancel the rest."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        await self._unary.close()
        for stream in self._streams:
            await stream.close()


async def closed_loop(load: Load, transports: Transports, callers: int, count: int | None) -> None:
    """Keep ``callers`` calls in flight until the end or ``count`` calls."""
    loop, tally = asyncio.get_running_loop(), load.tally
    over = asyncio.Event()
    left = math.inf if count is None else count

    def call() -> None:
        nonlocal left
        now = time.monotonic()
        if now >= tally.stop or left <= 0:
            over.set()
            return
        left -= now >= tally.start
        transports.submit(load.requests.kind(), now, call)

    for _ in range(callers):
        call()
    loop.call_later(tally.stop - time.monotonic(), over.set)
    await over.wait()


async def open_loop(load: Load, transports: Transports, arrivals: Iterator[float]) -> None:
    """Start a call at each of ``arrivals``, in seconds of ``time.monotonic``."""
    loop = asyncio.get_running_loop()
    waiting: deque[tuple[Kind, float]] = deque()

    def release(intended: float) -> None:
        waiting.append((load.requests.kind(), intended))
        start()

    def start() -> None:
        while waiting and transports.in_flight < _MAX_IN_FLIGHT:
            transports.submit(*waiting.popleft(), start)

    await asyncio.to_thread(_pace, loop, arrivals, release)
    while waiting:
        kind, intended = waiting.popleft()
        load.tally.add_unanswered(kind, "UNSENT", intended)


def _pace(
    loop: asyncio.AbstractEventLoop, arrivals: Iterator[float], release: Callable[[float], None]
) -> None:
    """Release arrivals on time: a thread sleeps with µs precision, an event loop with ms."""
    for intended in arrivals:
        if (delay := intended - time.monotonic()) > 0:
            time.sleep(delay)
        loop.call_soon_threadsafe(release, intended)


def poisson(
    rate_per_s: float, *, begin: float, start: float, stop: float, count: int | None, seed: str
) -> Iterator[float]:
    """Yield the times of a Poisson process from ``begin`` to ``stop``.

    At most ``count`` of them are from ``start`` on.
    """
    source, at, left = random.Random(seed), begin, math.inf if count is None else count
    while (at := at + source.expovariate(rate_per_s)) < stop and left > 0:
        left -= at >= start
        yield at


@asynccontextmanager
async def connected(plan: Plan) -> AsyncIterator[list[grpc.aio.Channel]]:
    """Yield separate, established connections without retries."""
    options = (*channel_options(retried=False), ("grpc.use_local_subchannel_pool", 1))
    channels = [open_async_channel(plan.target, plan.tls, options) for _ in range(plan.connections)]
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            for channel in channels:
                await channel.channel_ready()
        yield channels
    finally:
        for channel in channels:
            await channel.close()


async def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run the part of a load in ``job`` and return its results."""
    plan = plan_of(job["plan"])
    index, shape = job["index"], tuple(job["shape"])
    requests = prepare(plan, shape, index)
    count = None if plan.count is None else share(plan.count, index, plan.processes)
    async with connected(plan) as channels:
        print("ready", flush=True)
        begin = float(await asyncio.to_thread(sys.stdin.readline))
        start = begin + plan.warm_up_s
        stop = start + plan.duration_s
        tally = Tally(start=start, stop=stop, deadline_s=plan.deadline_s)
        load = Load(plan, requests, tally, 4 * math.prod(shape))
        transports = Transports(load, channels)
        while (early := begin - time.monotonic()) > 0:  # Timers may be a millisecond early.
            await asyncio.sleep(early)
        spent = _cpu_s()
        if plan.callers is not None:
            await closed_loop(load, transports, share(plan.callers, index, plan.processes), count)
        else:
            assert plan.rate_per_s is not None
            rate, seed = plan.rate_per_s / plan.processes, f"{plan.seed} {index} arrivals"
            arrivals = poisson(rate, begin=begin, start=start, stop=stop, count=count, seed=seed)
            await open_loop(load, transports, arrivals)
        busy = (_cpu_s() - spent) / (time.monotonic() - begin)
        await transports.drain(plan.drain_s)
    return tally.document() | {"busy_share": busy}


def plan_of(document: dict[str, Any]) -> Plan:
    """Return the plan of a document written by ``_run``."""
    tls = document.pop("tls")
    document["sigma"] = tuple(document["sigma"])
    return Plan(**document, tls=None if tls is None else Tls(**tls))


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Run one plan."""
    sys.setswitchinterval(5e-4)  # The pacing thread must not wait 5 ms for its turn.
    job = json.loads(sys.stdin.readline())
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        print(json.dumps(runner.run(run(job))), flush=True)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return the loop factory of uvloop if installed, on which a call takes less time."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


if __name__ == "__main__":
    main()
