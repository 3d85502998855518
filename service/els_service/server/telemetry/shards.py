"""Metrics of banks in shards."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from els_service.shards.shard_set import live_sets

_LABELS = ("bank", "shard")


class ShardCollector(Collector):
    """Time, readiness and restarts of every shard of this server; nothing without shards."""

    def collect(self) -> Iterator[Metric]:
        """Yield the families."""
        sets = live_sets()
        if not sets:
            return
        seconds = SummaryMetricFamily(
            "els_shard_seconds", "Time from a question to a shard's answer.", labels=_LABELS
        )
        ready = GaugeMetricFamily(
            "els_shard_ready", "1 while a shard has its slice loaded, else 0.", labels=_LABELS
        )
        restarts = CounterMetricFamily(
            "els_shard_restarts", "Processes of a shard started after the first.", labels=_LABELS
        )
        again = CounterMetricFamily(
            "els_shard_asked_again", "Operations asked again of a lost shard.", labels=_LABELS
        )
        for one in sets:
            for shard, statistics in zip(one.shards, one.statistics, strict=True):
                labels = [one.name, shard.name]
                seconds.add_metric(labels, statistics.count, statistics.seconds)
                ready.add_metric(labels, float(shard.ready))
                restarts.add_metric(labels, shard.restarts)
                again.add_metric(labels, statistics.asked_again)
        yield from (seconds, ready, restarts, again)
