"""Prometheus metrics of calls, queues and batches.

The event loop counts in plain numbers; metric families are built by each scrape. ``grpc_server_…``
have the names, labels and code values of go-grpc-prometheus, so that dashboards and alerts for it
work.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from grpc import StatusCode
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from els_service import logs
from els_service.engine.request_context import REASONS, BatchRecord
from els_service.server.telemetry import process
from els_service.server.telemetry.histogram import PENDING, Histogram, family, merged
from els_service.server.telemetry.shards import ShardCollector
from els_service.version import COMMIT, VERSION

_SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_LAG = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)

RETAIN_S = 3600.0
"""Time from a model's unload to the end of its series; scrapers must read them within it."""
RETAINED_MODELS = 64
"""Maximum unloaded models with series; beyond it those unloaded first end early."""

_MODEL = ("model",)
_CODES = tuple(code.name for code in StatusCode)
_METHOD = ("grpc_type", "grpc_service", "grpc_method")

_GAUGES = {
    "els_queue_items": "Requests, or parts of one, waiting in the queue.",
    "els_queue_cost_seconds": "Predicted compute time of the queued requests.",
    "els_queue_milliseconds": "Predicted compute time of the queued requests of all models, in "
    "whole milliseconds: for endpoint pickers, which read one series and drop fractions.",
    "els_calls_in_flight": "Calls whose response is not yet sent, or that a drain cut short.",
    "els_device_busy_seconds_total": "Time for which a device was busy.",
    "els_device_running_seconds": "Time since the start of a device's current batch; 0 if idle.",
    "els_device_stalled_seconds": "Time since the last progress of a device's current batch.",
    "els_drain_limit_seconds": "Time after which a drain interrupts calls in flight.",
    "els_draining_seconds": "Time since the start of the drain; 0 before it.",
    "els_health_watchers": "Health watch streams, by port: grpc or health.",
    "els_health_watchers_stalled": "Health watch streams dropped for not reading, not yet ended.",
    "els_model_refused": "1 if the latest load of a model failed, else 0.",
    "els_memory_in_flight_bytes": "Bytes of requests and trajectories in flight.",
    "els_memory_in_flight_limit_bytes": "Maximum bytes in flight of all callers together.",
    "els_model_memory_bytes": "Memory of a loaded model's weights or bank.",
    "els_queue_limit_seconds": "Maximum predicted compute time of one model's queue.",
    "els_queue_reserved_seconds": "Predicted compute time reserved in the queue: of requests, as "
    "predicted on arrival, and of one step of each trajectory.",
    "els_reloaded_file_stale_seconds": "Time for which a reloaded file has been invalid while its "
    "last valid content is used; 0 if it is current.",
    "els_serving": "1 while the server's health is SERVING, else 0.",
    "els_trajectories": "Trajectories in progress.",
    "els_watchdog_seconds": "Time without progress of a batch after which a device counts as hung.",
}
"""Name → help of the metrics that engine and server compute at each scrape."""
_HEAP = {
    "els_python_blocks": "Memory blocks allocated by Python.",
    "els_malloc_used_bytes": "Bytes allocated by malloc; unbounded growth means a leak.",
    "els_malloc_free_bytes": "Free bytes kept by malloc, which may be resident.",
}

Gauges = Iterable[tuple[str, dict[str, str], float]]
"""(name, labels, value)."""


class Method:
    """Counters of one RPC method.

    Args:
        kind: unary, client_stream, server_stream or bidi_stream.
        service: full name.
        name: of the method.
        model_field: field of requests that names the model; empty if there is none.
    """

    __slots__ = (
        *("ended", "kind", "labels", "model_field", "name", "path"),
        *("received", "sent", "started"),
    )

    def __init__(self, kind: str, service: str, name: str, model_field: str) -> None:
        self.kind, self.name, self.model_field = kind, name, model_field
        self.path = f"{service}/{name}"
        self.labels = kind, service, name
        self.started = 0
        """Calls started, as counted by the interceptor."""
        self.received = 0
        """Messages received, as counted by the parser."""
        self.sent = 0
        """Messages of response streams; unary methods send one per successful call."""
        self.ended: dict[tuple[str | None, str], Histogram] = {}
        """Durations in seconds by model and code; model None sums those whose series have ended."""

    def end(self, model: str, code: str, seconds: float, trace_id: str | None = None) -> None:
        """Count the end of a call."""
        histogram = self.ended.get((model, code))
        if histogram is None:
            histogram = self.ended[model, code] = Histogram(_SECONDS)
        histogram.observe(seconds)
        if trace_id is not None:
            histogram.exemplify(seconds, trace_id)

    def retire(self, models: set[str]) -> None:
        """End the series of models; the method's counters keep their calls."""
        retired = [key for key in self.ended if key[0] in models]
        kept = {key: histogram for key, histogram in self.ended.items() if key[0] not in models}
        for code in {code for _, code in retired}:
            keys = [(None, code), *(key for key in retired if key[1] == code)]
            kept[None, code] = merged([self.ended[k] for k in keys if k in self.ended], _SECONDS)
        # In one step: otherwise a scrape in between would see counters decrease.
        self.ended = kept

    def messages_sent(self) -> int:
        """Return the number of messages sent."""
        if self.kind in ("server_stream", "bidi_stream"):
            return self.sent
        return sum(each.count for (_, code), each in list(self.ended.items()) if code == "OK")


class _Batches:
    """Durations, sizes and predicted costs of one model's batches."""

    __slots__ = ("_pending", "compute", "cost", "images")

    def __init__(self) -> None:
        self.compute, self.cost = Histogram(_SECONDS), Histogram(_SECONDS)
        self.images = Histogram(_IMAGES)
        self._pending: deque[tuple[float, int, float]] = deque()

    def observe(self, seconds: float, images: int, cost: float) -> None:
        """Add one batch."""
        # One append instead of three: each small call passes here.
        self._pending.append((seconds, images, cost))
        if len(self._pending) >= PENDING:
            self.settle()

    def settle(self) -> _Batches:
        """Count the pending batches; return the histograms."""
        batches = []
        with suppress(IndexError):  # another thread may settle at the same time
            while True:
                batches.append(self._pending.popleft())
        if batches:
            for histogram, values in zip(
                (self.compute, self.images, self.cost), zip(*batches, strict=True), strict=True
            ):
                histogram.extend(values)
        return self


class Metrics(Collector):
    """All metrics, in a registry of their own; implements the engine's ``Observer``.

    Args:
        on_batch: receives each batch, for tracing.
    """

    def __init__(self, on_batch: Callable[[BatchRecord], None] | None = None) -> None:
        self.registry = CollectorRegistry()
        self._on_batch = on_batch
        self._methods: list[Method] = []
        self._queued: dict[str, Histogram] = {}
        self._computed: dict[str, _Batches] = {}
        self._dropped: dict[tuple[str, str], int] = {}
        self._lag, self._latest_lag = Histogram(_LAG), 0.0
        self._unloaded: dict[str, float] = {}
        """Unloaded model with series → monotonic time at which it was found; oldest first."""
        self.gauges: Callable[[], Gauges] = tuple
        """Called by each scrape, in its thread; names as in ``_GAUGES``."""
        ProcessCollector(registry=self.registry)
        self.registry.register(self)
        self.registry.register(ShardCollector())

    def method(self, kind: str, service: str, name: str, model_field: str = "") -> Method:
        """Create and export the counters of a method; arguments as of ``Method``."""
        method = Method(kind, service, name, model_field)
        self._methods.append(method)
        return method

    def on_queued(self, model: str, seconds: float) -> None:
        """Count one queued request or chunk, which waited for ``seconds``."""
        histogram = self._queued.get(model)
        if histogram is None:
            histogram = self._queued[model] = Histogram(_SECONDS)
        histogram.observe(seconds)

    def on_computed(self, model: str, seconds: float, images: int, cost: float) -> None:
        """Count one batch of ``images``, computed in ``seconds``, predicted as ``cost`` seconds."""
        batches = self._computed.get(model)
        if batches is None:
            batches = self._computed[model] = _Batches()
        batches.observe(seconds, images, cost)

    def on_dropped(self, model: str, reason: str) -> None:
        """Count one request without a delivered response."""
        key = model, reason
        self._dropped[key] = self._dropped.get(key, 0) + 1

    def on_batch(self, batch: BatchRecord) -> None:
        """Trace one batch."""
        if self._on_batch is not None:
            self._on_batch(batch)

    def lagged(self, seconds: float) -> None:
        """Observe a lag of the event loop."""
        self._latest_lag = seconds
        self._lag.observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """Yield all metric families; called in the scrape's thread."""
        yield from self._of_calls()
        yield from self._of_methods()
        yield from self._of_batches()
        yield from _of_gauges(self.gauges())
        yield from self._of_process()

    def retire(self, served: Iterable[str], now: float | None = None) -> None:
        """End the series of models unloaded for ``RETAIN_S``; called in the event loop's thread.

        Args:
            served: names of the models that are served or being loaded.
            now: on the monotonic clock.
        """
        now = time.monotonic() if now is None else now
        unloaded = self._with_series() - set(served)
        known = {model: since for model, since in self._unloaded.items() if model in unloaded}
        self._unloaded = known | dict.fromkeys(sorted(unloaded - known.keys()), now)
        oldest = list(self._unloaded)[: max(0, len(self._unloaded) - RETAINED_MODELS)]
        over = {model for model, since in self._unloaded.items() if now - since >= RETAIN_S}
        for model in (retired := over.union(oldest)):
            del self._unloaded[model]
            self._queued.pop(model, None)
            self._computed.pop(model, None)
        for key in [key for key in self._dropped if key[0] in retired]:
            del self._dropped[key]
        for method in self._methods:
            method.retire(retired)

    def _with_series(self) -> set[str]:
        """Return the models with series, without the empty name of calls without a model."""
        called = {model for method in self._methods for model, _ in method.ended if model}
        dropped = {model for model, _ in self._dropped}
        return (called | self._queued.keys() | self._computed.keys() | dropped) - {""}

    def _of_calls(self) -> Iterator[Metric]:
        yield family(
            "els_request_seconds",
            "Time from a request's arrival to its last response.",
            ("model", "method", "code"),
            (
                ((model, method.name, code), histogram)
                for method in self._methods
                for (model, code), histogram in list(method.ended.items())
                if model is not None
            ),
        )

    def _of_methods(self) -> Iterator[Metric]:
        started = CounterMetricFamily("grpc_server_started", "Calls started.", labels=_METHOD)
        received = CounterMetricFamily(
            "grpc_server_msg_received", "Messages received.", labels=_METHOD
        )
        sent = CounterMetricFamily("grpc_server_msg_sent", "Messages sent.", labels=_METHOD)
        handled = CounterMetricFamily(
            "grpc_server_handled", "Calls ended, by status.", labels=(*_METHOD, "grpc_code")
        )
        seconds = []
        for method in self._methods:
            ended = list(method.ended.items())
            started.add_metric(method.labels, method.started)
            received.add_metric(method.labels, method.received)
            sent.add_metric(method.labels, method.messages_sent())
            # From zero on, as an option of go-grpc-prometheus: a rate does not see the first
            # value of a series.
            for code in _CODES:
                count = sum(each.count for (_, found), each in ended if found == code)
                handled.add_metric((*method.labels, _go_code(code)), count)
            seconds.append((method.labels, merged([histogram for _, histogram in ended], _SECONDS)))
        yield from (started, received, sent, handled)
        text = "Time from a call's arrival to its end."
        yield family("grpc_server_handling_seconds", text, _METHOD, seconds)

    def _of_batches(self) -> Iterator[Metric]:
        queued = [((model,), histogram) for model, histogram in list(self._queued.items())]
        computed = [((model,), batches.settle()) for model, batches in list(self._computed.items())]
        text = "Time that a request, or a part of one, waited in the queue."
        yield family("els_queue_seconds", text, _MODEL, queued)
        compute = [(labels, batches.compute) for labels, batches in computed]
        yield family("els_compute_seconds", "Compute time of a batch.", _MODEL, compute)
        images = [(labels, batches.images) for labels, batches in computed]
        yield family("els_batch_size", "Images of a batch.", _MODEL, images)
        cost = [(labels, batches.cost) for labels, batches in computed]
        yield family("els_batch_cost_seconds", "Predicted compute time of a batch.", _MODEL, cost)
        dropped = CounterMetricFamily(
            "els_dropped",
            "Requests without a delivered response.",
            labels=("model", "reason"),
        )
        # From zero on, as above.
        for model in {*list(self._computed), *(model for model, _ in list(self._dropped))}:
            for reason in REASONS:
                dropped.add_metric((model, reason), self._dropped.get((model, reason), 0))
        yield dropped

    def _of_process(self) -> Iterator[Metric]:
        text = "Lag of the event loop, measured ten times a second."
        yield family("els_event_loop_lag_seconds", text, (), [((), self._lag)])
        text = "Latest lag of the event loop."
        yield GaugeMetricFamily("els_event_loop_lag_latest_seconds", text, self._latest_lag)
        for name, value in process.heap_sizes():
            yield GaugeMetricFamily(name, _HEAP[name], value)
        text = "Log records that could not be written."
        yield CounterMetricFamily("els_log_records_lost", text, logs.lost())
        build = GaugeMetricFamily(
            "els_build_info",
            "Always 1; version and commit are labels.",
            labels=("version", "commit"),
        )
        build.add_metric((VERSION, COMMIT), 1)
        yield build


def _of_gauges(gauges: Gauges) -> list[Metric]:
    """Return the metric families; values with equal labels (versions of a model) are summed."""
    sums: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for name, labels, value in gauges:
        by_labels, key = sums.setdefault(name, {}), tuple(labels.items())
        by_labels[key] = by_labels.get(key, 0.0) + value
    families = []
    for name, by_labels in sums.items():
        kind = "counter" if name.endswith("_total") else "gauge"
        metric = Metric(name.removesuffix("_total"), _GAUGES[name], kind)
        for key, value in by_labels.items():
            metric.add_sample(name, dict(key), value)
        families.append(metric)
    return families


def _go_code(code: str) -> str:
    """Return a status code in Go's notation: ``InvalidArgument``."""
    if code == "CANCELLED":
        return "Canceled"
    return code if code == "OK" else code.title().replace("_", "")
