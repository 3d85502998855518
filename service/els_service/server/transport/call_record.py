"""Record of a call in progress: its method, start time, span and log fields."""

from __future__ import annotations

import re
import time
import uuid
from typing import TYPE_CHECKING, Any

from els_service.engine.request_context import timed_out
from els_service.server.telemetry.metrics import Method
from els_service.server.transport.deadlines import unrounded_s
from els_service.server.transport.grpc_types import Context

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
_REQUEST_ID_LENGTH = 128


class CallRecord:
    """One call in progress; the ``CallContext`` of its log records."""

    __slots__ = ("_fields", "context", "method", "request", "since", "trace", "trace_id")

    def __init__(self, method: Method, request: Any, context: Context) -> None:
        self.method, self.request, self.context = method, request, context
        self.trace: Span | None = None
        self.trace_id: str | None = None
        self.since = time.monotonic()
        self._fields: dict[str, str] | None = None

    def log_fields(self) -> dict[str, str]:
        """Return the ids in every log record of the call; computed at the first record."""
        if self._fields is None:
            self._fields = _ids(self.context, self.trace_id)
        return self._fields

    def is_late(self) -> bool:
        """Return whether the deadline has passed, allowing for gRPC's rounding of timeouts."""
        left = self.context.time_remaining()
        if left is None:
            return False
        elapsed = time.monotonic() - self.since
        return timed_out(unrounded_s(left + elapsed) - elapsed)


def _ids(context: Context, trace_id: str | None) -> dict[str, str]:
    """Return the caller's ``x-request-id`` or a new one, and the trace id of a traced call."""
    metadata = dict(context.invocation_metadata() or ())
    ids = {"request_id": metadata.get("x-request-id", "")[:_REQUEST_ID_LENGTH] or uuid.uuid4().hex}
    if caller := _TRACEPARENT.match(metadata.get("traceparent", "")):
        ids["trace_id"] = caller[1]
    elif trace_id is not None:
        ids["trace_id"] = trace_id
    return ids
