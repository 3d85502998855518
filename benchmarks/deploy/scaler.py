"""Simulation of replicas, queues and an autoscaler for ``benchmarks.deploy.simulate``.

Time is discrete (ticks). Calls are a Poisson process, uniform over serving replicas; service times
are drawn from measured ones. A replica is a FIFO queue (Lindley's recursion, per tick) that rejects
calls whose wait would exceed ``queue_s``. At each poll the scaler reads queued work and the busy
share of the last minute, one scrape late, and computes the desired replicas by the rules of a
HorizontalPodAutoscaler (kubernetes.io, "Algorithm details" and "Configurable scaling behavior"):
the maximum over metrics of ceil(metric / target), unless within 10 % of the current number; at most
doubled per poll; reduced by at most a fifth per minute, and not below the maximum of five minutes.
A replica serves ``start_s`` after it is requested, and is paid for from the request on. The latency
quantile, the third trigger of ``deploy/components/keda``, is omitted: it only scales up, and later
than the first two.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

_MANY = 32
"""Number of calls per replica and tick from which their work is drawn as a normal sum."""
_TOLERANCE = 0.1
_WISHES_S, _SHRINK_S, _SHRINK_TO = 300.0, 60.0, 0.8

_Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class World:
    """Parameters of a simulation.

    Attributes:
        service_s: measured service times in core seconds, equally likely.
        replicas: initial and minimum number of replicas.
        load: utilisation before the step; more than 0.
        step: factor of the load from ``step_at_s`` to ``back_at_s``; by default at the worst time,
            just after the metrics of the next poll were read.
        start_s: seconds from the request of a replica until it serves.
        poll_s: interval of the autoscaler.
        scrape_s: age of the metrics.
        queue_s: maximum queued work of a replica, in seconds.
        queue_target_s: target of the queued work of a replica, in seconds.
        busy_target: target of the busy share of a replica; None: only queues are used.
        busy_over_s: averaging window of the busy share.
        most: maximum replicas, as a multiple of the minimum.
        seed: seed of the random numbers.
    """

    service_s: Sequence[float]
    replicas: int = 2
    load: float = 0.3
    step: float = 10.0
    step_at_s: float = 315.0
    back_at_s: float = 1515.0
    end_s: float = 2400.0
    tick_s: float = 0.1
    start_s: float = 30.0
    poll_s: float = 15.0
    scrape_s: float = 15.0
    queue_s: float = 30.0
    queue_target_s: float = 1.0
    busy_target: float | None = None
    busy_over_s: float = 60.0
    most: float = 10.0
    seed: int = 0


@dataclass
class Trace:
    """Results: time series per tick, and sums."""

    at_s: list[float] = field(default_factory=list)
    serving: list[int] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)
    waiting_s: list[float] = field(default_factory=list)
    """Mean queued work of a replica."""
    answered: float = 0.0
    refused: float = 0.0
    paid_s: float = 0.0


@dataclass
class _Cluster:
    backlog_s: _Floats
    """Queued work of each serving replica."""
    starting: deque[float] = field(default_factory=deque)
    """Times at which requested replicas will serve."""
    busy_s: float = 0.0
    """Total compute time of all replicas."""

    def size(self) -> int:
        return len(self.backlog_s) + len(self.starting)

    def tick(
        self, world: World, now_s: float, rate_per_s: float, trace: Trace, draw: _Draw
    ) -> None:
        while self.starting and self.starting[0] <= now_s:
            self.starting.popleft()
            self.backlog_s = np.append(self.backlog_s, 0.0)
        count = len(self.backlog_s)
        calls = draw.poisson(rate_per_s * world.tick_s / count, count)
        come = _work(draw, np.asarray(world.service_s), calls)
        taken = np.minimum(come, np.maximum(world.queue_s + world.tick_s - self.backlog_s, 0.0))
        done = np.minimum(self.backlog_s + taken, world.tick_s)
        self.backlog_s = self.backlog_s + taken - done
        kept = float(calls @ np.divide(taken, come, out=np.ones(count), where=come > 0))
        trace.answered += kept
        trace.refused += float(calls.sum()) - kept
        trace.paid_s += self.size() * world.tick_s
        self.busy_s += float(done.sum())

    def resize(self, wanted: int, serves_at_s: float, trace: Trace) -> None:
        self.starting.extend([serves_at_s] * (wanted - self.size()))
        while self.size() > wanted and self.starting:
            self.starting.pop()
        # A removed replica finishes its queue, and is paid for until then.
        trace.paid_s += float(self.backlog_s[wanted:].sum())
        self.backlog_s = self.backlog_s[:wanted]


_Draw: TypeAlias = np.random.Generator


def _work(draw: _Draw, service_s: _Floats, calls: NDArray[np.int64]) -> _Floats:
    """Return the work of ``calls`` for each replica."""
    if calls.mean() >= _MANY:
        mean, spread = float(service_s.mean()), float(service_s.std())
        work = mean * calls + spread * np.sqrt(calls) * draw.standard_normal(len(calls))
        return work.clip(0.0)
    to = np.repeat(np.arange(len(calls)), calls)
    return np.bincount(to, draw.choice(service_s, len(to)), len(calls)).astype(np.float64)


class _Scaler:
    def __init__(self, world: World) -> None:
        self._world = world
        self._wishes: deque[int] = deque(maxlen=round(_WISHES_S / world.poll_s))
        self._sizes: deque[int] = deque(maxlen=round(_SHRINK_S / world.poll_s))

    def desired_replicas(self, now: int, waiting_s: float, busy: float) -> int:
        """Return the desired replicas from the current number and the metrics."""
        world = self._world
        values = [waiting_s / world.queue_target_s]
        if world.busy_target is not None:
            values.append(busy / world.busy_target)
        wishes = [now if abs(v / now - 1) <= _TOLERANCE else math.ceil(v) for v in values]
        most = min(2 * now, math.ceil(world.most * world.replicas))
        wish = max(world.replicas, min(most, max(wishes)))
        self._wishes.append(wish)
        self._sizes.append(now)
        if wish >= now:
            return wish
        return min(now, max(*self._wishes, math.floor(_SHRINK_TO * max(self._sizes))))


def simulate(world: World) -> Trace:
    """Return the results of ``end_s`` simulated seconds."""
    draw, trace, scaler = np.random.default_rng(world.seed), Trace(), _Scaler(world)
    cluster = _Cluster(np.zeros(world.replicas))
    rate_per_s = world.load * world.replicas / float(np.mean(world.service_s))
    late = round(world.scrape_s / world.tick_s)
    waiting_s: deque[float] = deque(maxlen=1 + late)
    busy_s: deque[float] = deque(maxlen=1 + late + round(world.busy_over_s / world.tick_s))
    polls = round(world.poll_s / world.tick_s)
    for number in range(round(world.end_s / world.tick_s)):
        now_s = number * world.tick_s
        stepped = world.step_at_s <= now_s < world.back_at_s
        cluster.tick(world, now_s, rate_per_s * (world.step if stepped else 1.0), trace, draw)
        waiting_s.append(float(cluster.backlog_s.sum()))
        busy_s.append(cluster.busy_s)
        if number % polls == polls - 1:
            busy = (busy_s[-1 - min(late, number)] - busy_s[0]) / world.busy_over_s
            wanted = scaler.desired_replicas(cluster.size(), waiting_s[0], busy)
            cluster.resize(wanted, now_s + world.start_s, trace)
        trace.at_s.append(now_s)
        trace.serving.append(len(cluster.backlog_s))
        trace.wanted.append(cluster.size())
        trace.waiting_s.append(float(cluster.backlog_s.mean()))
    return trace
