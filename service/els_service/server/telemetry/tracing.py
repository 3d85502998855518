"""OpenTelemetry spans of calls, their queueing and compute times, and batches.

    caller's span ─► call (server span) ─┬► queue
                                         └► compute ··link··► batch ··links··► call, call, …

A batch may have members of several callers, so its span is the root of a trace of its own. A call
is traced if its traceparent is sampled, or, without a traceparent, at random; other calls create no
span. Import this module only if tracing is on: it needs the extra ``tracing``.
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
    """Creates spans, and exports them in a thread of its own.

    Args:
        endpoint: of an OTLP collector with gRPC, ``http://…`` or ``https://…``.
        ratio: share of the calls without a traceparent that are traced.
        exporter: receives the spans instead of ``endpoint``.
    """

    def __init__(
        self, endpoint: str, ratio: float, *, exporter: SpanExporter | None = None
    ) -> None:
        self._ratio = ratio
        self._exporter = exporter or _exporter(endpoint)
        resource = Resource.create({"service.name": "els-denoise", "service.version": FULL})
        # The sampling decision is made before a span is created.
        self._provider = TracerProvider(
            sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("els_service")

    def begin(self, method: str, metadata: Metadata) -> Span | None:
        """Return the span of a call that starts now; None if it is not traced.

        Args:
            method: full name, ``package.Service/Method``.
            metadata: of the call, with ``traceparent`` and ``tracestate``.
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
        """End the span of a call with its status code (``OK``, ``INVALID_ARGUMENT``, …)."""
        span.set_attributes({"rpc.response.status_code": code, "els.model": model})
        if code in _FAULTS:
            span.set_attribute("error.type", code)
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    def trace_id(self, span: Span) -> str:
        """Return the trace id of a span, 32 hexadecimal digits."""
        return trace.format_trace_id(span.get_span_context().trace_id)

    def on_batch(self, batch: BatchRecord) -> None:
        """Create the spans of a batch if any of its members is traced."""
        members = [
            (member, queued_ns)
            for member, queued_ns in zip(batch.members, batch.queued_ns, strict=True)
            if isinstance(member, Span)
        ]
        if not members:
            return
        attributes = {"els.model": batch.model, "els.device": batch.device}
        batch_span = self._tracer.start_span(
            "batch",
            trace.set_span_in_context(trace.INVALID_SPAN),
            SpanKind.INTERNAL,
            {**attributes, "els.images": batch.images, "els.cost_seconds": batch.cost},
            # A call that was split into chunks may be a member several times.
            [Link(span.get_span_context()) for span in dict.fromkeys(span for span, _ in members)],
            batch.started_ns,
        )
        batch_span.end(batch.ended_ns)
        links = [Link(batch_span.get_span_context())]
        for member, queued_ns in members:
            parent = trace.set_span_in_context(member)
            queue = self._tracer.start_span("queue", parent, start_time=queued_ns)
            queue.end(batch.started_ns)
            compute = self._tracer.start_span(
                "compute",
                parent,
                attributes=attributes,
                links=links,
                start_time=batch.started_ns,
            )
            compute.end(batch.ended_ns)

    def close(self) -> None:
        """Export the remaining spans; blocks for seconds if the collector is unreachable."""
        closing = Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(_CLOSE_S)
        if closing.is_alive():
            self._exporter.shutdown()


def _exporter(endpoint: str) -> OTLPSpanExporter:
    # The declared type allows string values only; gRPC also takes integers.
    direct: Any = (("grpc.enable_http_proxy", 0),) if _is_local(endpoint) else None
    return OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_S, channel_options=direct)


def _is_local(endpoint: str) -> bool:
    """Return whether a collector has a loopback name, which a proxy could not reach."""
    return is_loopback_name(urlsplit(endpoint).hostname or "")
