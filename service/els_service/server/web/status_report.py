"""State of models, queues, latency and batches as JSON, from the metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client.metrics_core import Metric

_MAX_AGE_S = 0.5
"""Time for which one report answers all requests."""
_OF_MODEL = {
    "els_queue_items": "queue_items",
    "els_queue_cost_seconds": "queue_cost_seconds",
    "els_model_memory_bytes": "memory_bytes",
    "els_batch_size_sum": "images",
    "els_batch_size_count": "batches",
    "els_compute_seconds_sum": "compute_seconds",
    "els_queue_seconds_sum": "queued_seconds",
    "els_queue_seconds_count": "queued",
    "els_dropped_total": "dropped",
}
"""Sample with a label ``model`` → name in the report, summed over its other labels."""
_OF_SERVER = {
    "els_calls_in_flight": "calls_in_flight",
    "els_trajectories": "trajectories",
    "els_memory_in_flight_bytes": "memory_in_flight_bytes",
    "els_memory_in_flight_limit_bytes": "memory_in_flight_limit_bytes",
    "els_device_busy_seconds_total": "device_busy_seconds",
    "els_event_loop_lag_latest_seconds": "event_loop_lag_seconds",
    "els_queue_limit_seconds": "queue_limit_seconds",
    "els_draining_seconds": "draining_seconds",
    "els_serving": "serving",
}
_LATENCY, _ENDED = "els_request_seconds_bucket", "els_request_seconds_count"


class StatusReport:
    """Report that requests within half a second share, so that many readers cost no more than one.

    Args:
        collect: yields the metric families; called in a thread.
    """

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect
        self._lock = asyncio.Lock()
        self._read_at, self._report = -_MAX_AGE_S, dict[str, Any]()

    async def current(self) -> dict[str, Any]:
        """Return ``server``, values by name, and ``models``, such values by model.

        Counters rise from the start of the server: rates are differences of two reports.
        ``latency`` has the number of successful calls in at most so many seconds.
        """
        async with self._lock:
            if time.monotonic() - self._read_at >= _MAX_AGE_S:
                self._report = await asyncio.to_thread(self._read)
                self._read_at = time.monotonic()
            return self._report

    def _read(self) -> dict[str, Any]:
        server: dict[str, float] = {}
        models: dict[str, dict[str, Any]] = {}
        for family in self._collect():
            for sample in family.samples:
                labels, model = sample.labels, sample.labels.get("model", "")
                if name := _OF_SERVER.get(sample.name):
                    server[name] = server.get(name, 0) + sample.value
                if not model:
                    continue
                found = models.setdefault(model, {"latency": {}, "ok": 0, "failed": 0})
                if name := _OF_MODEL.get(sample.name):
                    found[name] = found.get(name, 0) + sample.value
                elif sample.name == _LATENCY and labels["code"] == "OK":
                    bound, counts = labels["le"], found["latency"]
                    counts[bound] = counts.get(bound, 0) + sample.value
                elif sample.name == _ENDED:
                    found["ok" if labels["code"] == "OK" else "failed"] += sample.value
        return {"uptime_clock": time.monotonic(), "server": server, "models": models}
