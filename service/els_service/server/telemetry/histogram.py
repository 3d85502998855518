"""Histograms in plain numbers: the event loop observes, any thread reads.

``prometheus_client``'s own take two locks and a walk along the buckets for every observation, five
times as long as this. One writer needs no lock: a reader that comes between two of its steps sees
a sum that is one observation behind the counts.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.samples import Exemplar


class Histogram:
    """Counts of values by bucket, and their sum.

    Args:
        bounds: the buckets' largest values, increasing; one more bucket takes the rest.
    """

    __slots__ = ("bounds", "counts", "exemplars", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        self.exemplars: dict[int, Exemplar] = {}

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def exemplify(self, value: float, trace_id: str) -> None:
        """Remember a trace as the latest example of a value's bucket."""
        exemplar = Exemplar({"trace_id": trace_id}, value, time.time())
        self.exemplars[bisect_left(self.bounds, value)] = exemplar

    def buckets(self) -> list[tuple[str, float] | tuple[str, float, Exemplar]]:
        """Return (bound, values up to it, exemplar if any) of every bucket, the last infinite."""
        rows: list[tuple[str, float] | tuple[str, float, Exemplar]] = []
        bounds = [*(str(float(bound)) for bound in self.bounds), "+Inf"]
        for i, (bound, count) in enumerate(zip(bounds, accumulate(list(self.counts)), strict=True)):
            exemplar = self.exemplars.get(i)
            rows.append((bound, count) if exemplar is None else (bound, count, exemplar))
        return rows


def merged(tallies: Sequence[Histogram], bounds: tuple[float, ...]) -> Histogram:
    """Return one tally of all values of several with the same bounds."""
    one = Histogram(bounds)
    columns = zip(one.counts, *(tally.counts for tally in tallies), strict=True)
    one.counts = [sum(counts) for counts in columns]
    one.total = sum(tally.total for tally in tallies)
    for tally in tallies:
        one.exemplars |= tally.exemplars
    return one


def family(
    name: str, text: str, labels: Sequence[str], tallies: Iterable[tuple[Sequence[str], Histogram]]
) -> HistogramMetricFamily:
    """Return a histogram of (values of the labels, tally)."""
    histogram = HistogramMetricFamily(name, text, labels=labels)
    for values, tally in tallies:
        histogram.add_metric(values, tally.buckets(), tally.total)
    return histogram
