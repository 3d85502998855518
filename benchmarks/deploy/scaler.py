"""Replicas, a queue and an autoscaler, simulated: what ``benchmarks.deploy.simulate`` varies.

Time goes in ticks. Calls come by a Poisson process, to any serving replica alike; each takes a core
time drawn from the measured ones. A replica serves one after another (Lindley's recursion on the
work before it, to a tick) and refuses what would wait longer than ``queue_s``. At each poll the
scaler learns how much work waits and how many replicas' time the last minute took, one scrape
late, and wishes by the rules of a HorizontalPodAutoscaler (kubernetes.io, "Algorithm details" and
"Configurable scaling behavior"): ceil(metric / target) of the metric that wants most, unless that
is within 10 % of what there is; up at most to the double each poll; down by at most a fifth a
minute, and to no less than the largest wish of five minutes. A replica serves ``start_s`` after it
was wished for, and is paid from the wish on. The quantile of latency, the third trigger of
``deploy/components/keda``, is left out: it only ever asks for more, and the first two do so sooner.
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
"""Calls to a replica in a tick from which on their work is drawn as a normal sum."""
_TOLERANCE = 0.1
_WISHES_S, _SHRINK_S, _SHRINK_TO = 300.0, 60.0, 0.8

_Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class World:
    """What is simulated.

    Attributes:
        service_s: measured core times of one call each, equally likely.
        replicas: at first, and the fewest.
        load: of what they can serve, before the step; more than 0.
        step: how many times that load comes from ``step_at_s`` to ``back_at_s``; by default at the
            worst moment, when the metrics of the next poll have just been read.
        start_s: from a wish to a replica that serves.
        poll_s: between two wishes.
        scrape_s: how old the metrics are.
        queue_s: work that may wait for one replica.
        queue_target_s: work that shall wait for one replica.
        busy_target: share of its time that a replica shall compute; None: only queues count.
        busy_over_s: what that share is the mean of.
        most: replicas, as a multiple of the fewest.
        seed: of everything drawn.
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
    """What came of it: series by the tick, and sums."""

    at_s: list[float] = field(default_factory=list)
    serving: list[int] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)
    waiting_s: list[float] = field(default_factory=list)
    """Work before a replica, on average."""
    answered: float = 0.0
    refused: float = 0.0
    paid_s: float = 0.0


@dataclass
class _Cluster:
    backlog_s: _Floats
    """Work before each replica that serves."""
    starting: deque[float] = field(default_factory=deque)
    """When those that are wished for will serve."""
    busy_s: float = 0.0
    """Time that all replicas together computed."""

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
        # Who is told to end works off what it has, and is paid for that.
        trace.paid_s += float(self.backlog_s[wanted:].sum())
        self.backlog_s = self.backlog_s[:wanted]


_Draw: TypeAlias = np.random.Generator


def _work(draw: _Draw, service_s: _Floats, calls: NDArray[np.int64]) -> _Floats:
    """Return the work that ``calls`` bring to each replica."""
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

    def wish(self, now: int, waiting_s: float, busy: float) -> int:
        """Return how many replicas there shall be, of ``now``, of which ``busy`` computed."""
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
    """Return what happens in ``end_s`` seconds."""
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
            wanted = scaler.wish(cluster.size(), waiting_s[0], busy)
            cluster.resize(wanted, now_s + world.start_s, trace)
        trace.at_s.append(now_s)
        trace.serving.append(len(cluster.backlog_s))
        trace.wanted.append(cluster.size())
        trace.waiting_s.append(float(cluster.backlog_s.mean()))
    return trace
