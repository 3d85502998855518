"""Prometheus metrics: what was asked, how long it waited and computed, in which company."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Gauge, Histogram, start_http_server

from els_service.engine.terms import Launch
from els_service.version import COMMIT, VERSION

_SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

_Observe = Callable[[float], None]


class Metrics:
    """All metrics in one registry of their own; is the engine's ``Observer``."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Histogram(
            "els_request_seconds",
            "Time from a request's arrival to its last answer.",
            ("model", "method", "code"),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._queue = Histogram(
            "els_queue_seconds",
            "Time that an item waited for its batch.",
            ("model",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._compute = Histogram(
            "els_compute_seconds",
            "Time that a batch was computed.",
            ("model",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._batch = Histogram(
            "els_batch_size",
            "Images computed together.",
            ("model",),
            buckets=_IMAGES,
            registry=self.registry,
        )
        build = Gauge(
            "els_build_info",
            "Always 1; labels tell version and commit.",
            ("version", "commit"),
            registry=self.registry,
        )
        build.labels(VERSION, COMMIT).set(1)
        # Looking a child up by its labels costs more than observing it.
        self._answered: dict[tuple[str, str, str], _Observe] = {}
        self._queued: dict[str, _Observe] = {}
        self._computed: dict[str, tuple[_Observe, _Observe]] = {}

    def answered(self, model: str, method: str, code: str, seconds: float) -> None:
        """One request ended."""
        key = model, method, code
        if key not in self._answered:
            self._answered[key] = self._requests.labels(*key).observe
        self._answered[key](seconds)

    def queued(self, model: str, seconds: float) -> None:
        """One item waited this long."""
        if model not in self._queued:
            self._queued[model] = self._queue.labels(model).observe
        self._queued[model](seconds)

    def computed(self, model: str, seconds: float, images: int, cost: float) -> None:
        """One batch of ``images`` took this long."""
        if model not in self._computed:
            compute, batch = self._compute.labels(model), self._batch.labels(model)
            self._computed[model] = compute.observe, batch.observe
        observe_seconds, observe_images = self._computed[model]
        observe_seconds(seconds)
        observe_images(images)

    def dropped(self, model: str, reason: str) -> None:
        """One query got no answer."""

    def launched(self, launch: Launch) -> None:
        """One batch with a traced member was computed."""

    def serve(self, host: str, port: int) -> tuple[WSGIServer, Thread]:
        """Serve ``/metrics`` over HTTP from a thread; ``server_port`` tells where.

        Raises:
            OSError: The port cannot be bound.
        """
        return start_http_server(port, host, self.registry)
