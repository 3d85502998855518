"""OpenTelemetry spans of calls, their waits and computations, and batches.

    caller's span ─► call (server span) ─┬► queue
                                         └► compute ··link··► batch ··links··► call, call, …

A batch belongs to no caller, so its span begins a trace of its own. A call is traced where its
caller's traceparent says so, or by lot where it has none; any other one makes no span at all.
Import this where traces are asked for: it needs the extra ``tracing``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from els_service.engine.request_context import BatchRecord
from els_service.server.addresses import is_loopback_name
from els_service.version import FULL

_EXPORT_S, _CLOSE_S = 5.0, 5.0
_FAULTS = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)
"""Codes that are the server's fault, by OpenTelemetry's conventions."""
_PROPAGATOR = TraceContextTextMapPropagator()
_HEADERS = frozenset(_PROPAGATOR.fields)

Metadata = Sequence[tuple[str, Any]]


class Tracing:
    """Makes spans and sends them to a collector from a thread of its own.

    Args:
        endpoint: of an OTLP collector that speaks gRPC, ``http://…`` or ``https://…``.
        ratio: share of the calls without a caller's decision that are traced.
        exporter: takes the spans instead of ``endpoint``.
    """

    def __init__(
        self, endpoint: str, ratio: float, *, exporter: SpanExporter | None = None
    ) -> None:
        self._ratio = ratio
        self._exporter = exporter or _exporter(endpoint)
        resource = Resource.create({"service.name": "els-denoise", "service.version": FULL})
        # Whether to sample is decided before a span is made.
        self._provider = TracerProvider(
            sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("els_service")

    def begin(self, method: str, metadata: Metadata) -> Span | None:
        """Return the span of a call that begins now, or None where it is not traced.

        Args:
            method: full name, ``package.Service/Method``.
            metadata: of the call; ``traceparent`` and ``tracestate`` are read.
        """
        carrier = {key: value for key, value in metadata if key in _HEADERS}
        parent = _PROPAGATOR.extract(carrier) if carrier else None
        caller = trace.get_current_span(parent).get_span_context() if parent else None
        drawn = random.random() < self._ratio
        if not (caller.trace_flags.sampled if caller and caller.is_valid else drawn):
            return None
        attributes = {"rpc.system.name": "grpc", "rpc.method": method}
        return self._tracer.start_span(method, parent, SpanKind.SERVER, attributes)

    def end(self, span: Span, code: str, model: str) -> None:
        """End a call's span with its status code (``OK``, ``INVALID_ARGUMENT``, …)."""
        span.set_attributes({"rpc.response.status_code": code, "els.model": model})
        if code in _FAULTS:
            span.set_attribute("error.type", code)
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    def trace_id(self, span: Span) -> str:
        """Return the id of a span's trace, 32 hexadecimal digits."""
        return trace.format_trace_id(span.get_span_context().trace_id)

    def on_batch(self, launch: BatchRecord) -> None:
        """Make the spans of a batch, where any of its members is traced."""
        members = [
            (member, queued_ns)
            for member, queued_ns in zip(launch.members, launch.queued_ns, strict=True)
            if isinstance(member, Span)
        ]
        if not members:
            return
        attributes = {"els.model": launch.model, "els.device": launch.device}
        batch = self._tracer.start_span(
            "batch",
            trace.set_span_in_context(trace.INVALID_SPAN),
            SpanKind.INTERNAL,
            {**attributes, "els.images": launch.images, "els.cost_seconds": launch.cost},
            # A call of many images may be a member several times.
            [Link(span.get_span_context()) for span in dict.fromkeys(span for span, _ in members)],
            launch.started_ns,
        )
        batch.end(launch.ended_ns)
        company = [Link(batch.get_span_context())]
        for member, queued_ns in members:
            parent = trace.set_span_in_context(member)
            queue = self._tracer.start_span("queue", parent, start_time=queued_ns)
            queue.end(launch.started_ns)
            compute = self._tracer.start_span(
                "compute",
                parent,
                attributes=attributes,
                links=company,
                start_time=launch.started_ns,
            )
            compute.end(launch.ended_ns)

    def close(self) -> None:
        """Send what is left, within seconds even if nobody takes it. Blocks."""
        closing = Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(_CLOSE_S)
        if closing.is_alive():
            self._exporter.shutdown()


def _exporter(endpoint: str) -> OTLPSpanExporter:
    # Its type says that values are texts, but gRPC's are numbers, too.
    direct: Any = (("grpc.enable_http_proxy", 0),) if _is_near(endpoint) else None
    return OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_S, channel_options=direct)


def _is_near(endpoint: str) -> bool:
    """Return whether a collector is on this machine, by its name: a proxy could not reach it."""
    return is_loopback_name(urlsplit(endpoint).hostname or "")
