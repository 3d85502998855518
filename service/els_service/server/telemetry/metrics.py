"""Prometheus metrics of calls, queues and batches.

Everything is counted in plain numbers on the event loop; families are made when they are scraped.
``grpc_server_…`` have the names, labels and code values of go-grpc-prometheus, so that dashboards
and alerts written for it work.
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
from els_service.version import COMMIT, VERSION

_SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_LAG = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)

RETAIN_S = 3600.0
"""Time after a model's unload until its series end: so long may a scraper take to see the last."""
RETAINED_MODELS = 64
"""Unloaded models whose series are kept; beyond it the one unloaded longest ago goes sooner."""

_MODEL = ("model",)
_CODES = tuple(code.name for code in StatusCode)
_METHOD = ("grpc_type", "grpc_service", "grpc_method")

_GAUGES = {
    "els_queue_items": "Requests, or parts of one, waiting in the queue.",
    "els_queue_cost_seconds": "Predicted compute time of the queued requests.",
    "els_calls_in_flight": "Calls received whose response is not yet sent.",
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
"""What engine and server tell when they are asked, and its help."""
_HEAP = {
    "els_python_blocks": "Memory blocks allocated by Python.",
    "els_malloc_used_bytes": "Bytes allocated by malloc; unbounded growth means a leak.",
    "els_malloc_free_bytes": "Free bytes kept by malloc, which may be resident.",
}

Gauges = Iterable[tuple[str, dict[str, str], float]]
"""(name, labels, value)."""


class Method:
    """What became of the calls of one RPC method.

    Args:
        kind: unary, client_stream, server_stream or bidi_stream.
        service: full name.
        name: the method's.
        model_field: of the request, that names the model; empty where none does.
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
        """Calls begun; whoever handles them counts, as the messages."""
        self.received = 0
        self.sent = 0
        """Messages of streams of answers; others are the calls that ended well."""
        self.ended: dict[tuple[str | None, str], Histogram] = {}
        """Seconds by model and code; None stands for models whose series have ended."""

    def end(self, model: str, code: str, seconds: float, trace_id: str | None = None) -> None:
        """Count the end of a call."""
        histogram = self.ended.get((model, code))
        if histogram is None:
            histogram = self.ended[model, code] = Histogram(_SECONDS)
        histogram.observe(seconds)
        if trace_id is not None:
            histogram.exemplify(seconds, trace_id)

    def retire(self, models: set[str]) -> None:
        """End the series of models; the method's own counts keep their calls."""
        gone = [key for key in self.ended if key[0] in models]
        kept = {key: histogram for key, histogram in self.ended.items() if key[0] not in models}
        for code in {code for _, code in gone}:
            keys = [(None, code), *(key for key in gone if key[1] == code)]
            kept[None, code] = merged([self.ended[k] for k in keys if k in self.ended], _SECONDS)
        # In one step: a scrape in between would see the counts go back.
        self.ended = kept

    def answers(self) -> int:
        """Return how many messages were sent."""
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
        # One append, not three: every small call comes by.
        self._pending.append((seconds, images, cost))
        if len(self._pending) >= PENDING:
            self.settle()

    def settle(self) -> _Batches:
        """Count the pending batches; return the histograms."""
        with suppress(IndexError):  # another thread may settle, too
            while True:
                seconds, images, cost = self._pending.popleft()
                self.compute.observe(seconds)
                self.images.observe(images)
                self.cost.observe(cost)
        return self


class Metrics(Collector):
    """All metrics in one registry of their own; is the engine's ``Observer``.

    Args:
        on_batch: told of every batch too.
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
        """When models with series were first found not to be served; the oldest first."""
        self.gauges: Callable[[], Gauges] = tuple
        """Asked at every scrape, in the scraper's thread; names as in ``_GAUGES``."""
        ProcessCollector(registry=self.registry)
        self.registry.register(self)

    def method(self, kind: str, service: str, name: str, model_field: str = "") -> Method:
        """Return the counters of a method, from now on exported; arguments as of ``Method``."""
        method = Method(kind, service, name, model_field)
        self._methods.append(method)
        return method

    def on_queued(self, model: str, seconds: float) -> None:
        """One item waited this long."""
        histogram = self._queued.get(model)
        if histogram is None:
            histogram = self._queued[model] = Histogram(_SECONDS)
        histogram.observe(seconds)

    def on_computed(self, model: str, seconds: float, images: int, cost: float) -> None:
        """One batch of ``images`` took this long; ``cost`` seconds were predicted."""
        batches = self._computed.get(model)
        if batches is None:
            batches = self._computed[model] = _Batches()
        batches.observe(seconds, images, cost)

    def on_dropped(self, model: str, reason: str) -> None:
        """One item has no answer, or one that nobody took."""
        key = model, reason
        self._dropped[key] = self._dropped.get(key, 0) + 1

    def on_batch(self, launch: BatchRecord) -> None:
        """One batch ended."""
        if self._on_batch is not None:
            self._on_batch(launch)

    def lagged(self, seconds: float) -> None:
        """The event loop was this late."""
        self._latest_lag = seconds
        self._lag.observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """Yield every family; called in the thread of whoever scrapes."""
        yield from self._of_calls()
        yield from self._of_methods()
        yield from self._of_batches()
        yield from _of_gauges(self.gauges())
        yield from self._of_process()

    def retire(self, served: Iterable[str], now: float | None = None) -> None:
        """End the series of models unloaded for ``RETAIN_S``; call it in the event loop's thread.

        Args:
            served: Names of the models that are served or being loaded.
            now: On the monotonic clock.
        """
        now = time.monotonic() if now is None else now
        unloaded = self._with_series() - set(served)
        known = {model: since for model, since in self._unloaded.items() if model in unloaded}
        self._unloaded = known | dict.fromkeys(sorted(unloaded - known.keys()), now)
        oldest = list(self._unloaded)[: max(0, len(self._unloaded) - RETAINED_MODELS)]
        over = {model for model, since in self._unloaded.items() if now - since >= RETAIN_S}
        for model in (gone := over.union(oldest)):
            del self._unloaded[model]
            self._queued.pop(model, None)
            self._computed.pop(model, None)
        for key in [key for key in self._dropped if key[0] in gone]:
            del self._dropped[key]
        for method in self._methods:
            method.retire(gone)

    def _with_series(self) -> set[str]:
        """Return the models that have series; calls that name none have the empty name."""
        asked = {model for method in self._methods for model, _ in method.ended if model}
        dropped = {model for model, _ in self._dropped}
        return (asked | self._queued.keys() | self._computed.keys() | dropped) - {""}

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
            sent.add_metric(method.labels, method.answers())
            # From zero on, as go-grpc-prometheus can: a rate cannot see the call that makes a
            # series.
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
    """Return the families; what has the same labels, as versions of a model do, is summed."""
    sums: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for name, labels, value in gauges:
        by_labels, key = sums.setdefault(name, {}), tuple(labels.items())
        by_labels[key] = by_labels.get(key, 0.0) + value
    families = []
    for name, by_labels in sums.items():
        kind = "counter" if name.endswith("_total") else "gauge"
        one = Metric(name.removesuffix("_total"), _GAUGES[name], kind)
        for key, value in by_labels.items():
            one.add_sample(name, dict(key), value)
        families.append(one)
    return families


def _go_code(code: str) -> str:
    """Return a status code as Go writes it: ``InvalidArgument``."""
    if code == "CANCELLED":
        return "Canceled"
    return code if code == "OK" else code.title().replace("_", "")
