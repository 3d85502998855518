"""Histograms in plain numbers: any thread observes, any thread reads.

``prometheus_client``'s own take two locks and a search of the buckets for every observation, ten
times as long as this, which appends to a list of pending values. They are counted, under a lock,
when there are ``PENDING`` of them or when the histogram is read.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import accumulate
from operator import add
from threading import Lock

from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.samples import Exemplar

PENDING = 256
"""Values of one histogram that wait to be counted, at most."""


class Histogram:
    """Counts of values by bucket, and their sum.

    Args:
        bounds: the buckets' largest values, increasing; one more bucket takes the rest.
    """

    __slots__ = ("_counts", "_lock", "_pending", "_total", "bounds", "exemplars")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0
        self._pending: deque[float] = deque()
        self._lock = Lock()
        self.exemplars: dict[int, Exemplar] = {}

    def observe(self, value: float) -> None:
        """Add one value."""
        self._pending.append(value)
        if len(self._pending) >= PENDING:
            self.read()

    def read(self) -> tuple[list[int], float]:
        """Return the values in each bucket, the last without a bound, and the sum of all."""
        pending, counts, bounds = self._pending, self._counts, self.bounds
        with self._lock:
            for _ in range(len(pending)):
                value = pending.popleft()
                counts[bisect_left(bounds, value)] += 1
                self._total += value
            return counts.copy(), self._total

    @property
    def count(self) -> int:
        """Number of values."""
        return sum(self.read()[0])

    def add(self, others: Iterable[Histogram]) -> None:
        """Add all values of others with the same bounds."""
        for other in others:
            counts, total = other.read()
            with self._lock:
                self._counts[:] = map(add, self._counts, counts)
                self._total += total
            self.exemplars |= other.exemplars

    def exemplify(self, value: float, trace_id: str) -> None:
        """Remember a trace as the latest example of a value's bucket."""
        exemplar = Exemplar({"trace_id": trace_id}, value, time.time())
        self.exemplars[bisect_left(self.bounds, value)] = exemplar

    def buckets(
        self, counts: Sequence[int]
    ) -> list[tuple[str, float] | tuple[str, float, Exemplar]]:
        """Return (bound, values up to it, exemplar if any) of every bucket, the last infinite.

        Args:
            counts: as ``read`` returned them.
        """
        rows: list[tuple[str, float] | tuple[str, float, Exemplar]] = []
        bounds = [*(str(float(bound)) for bound in self.bounds), "+Inf"]
        for i, (bound, count) in enumerate(zip(bounds, accumulate(counts), strict=True)):
            exemplar = self.exemplars.get(i)
            rows.append((bound, count) if exemplar is None else (bound, count, exemplar))
        return rows


def merged(histograms: Sequence[Histogram], bounds: tuple[float, ...]) -> Histogram:
    """Return one histogram of all values of several with the same bounds."""
    one = Histogram(bounds)
    one.add(histograms)
    return one


def family(
    name: str,
    text: str,
    labels: Sequence[str],
    histograms: Iterable[tuple[Sequence[str], Histogram]],
) -> HistogramMetricFamily:
    """Return a metric family of (values of the labels, histogram)."""
    metric = HistogramMetricFamily(name, text, labels=labels)
    for values, histogram in histograms:
        counts, total = histogram.read()
        metric.add_metric(values, histogram.buckets(counts), total)
    return metric
