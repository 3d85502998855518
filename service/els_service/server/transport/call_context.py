"""The call in progress: caller, deadline, cancellation, log fields and scheduling context."""

from __future__ import annotations

import asyncio
import math
import re
import time
import uuid
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

from els_service.engine.request_context import (
    DEFAULT_PRIORITY,
    PRIORITIES,
    RequestContext,
    timed_out,
)
from els_service.errors import InvalidArgumentError
from els_service.logs import CALL
from els_service.server.telemetry.metrics import Method
from els_service.server.transport.grpc_types import Context

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
_REQUEST_ID_LENGTH = 128
_FINEST_S = 1e-3
_DIGITS = 1000
"""A timeout is sent as up to three digits of a unit: 1 ms, 10 ms, 100 ms, and so on."""
_IN_TRANSIT = 0.98
"""Minimum share of its timeout that a call has left on arrival, assumed to determine the unit."""

_token_name: ContextVar[str] = ContextVar("token_name")


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


def set_token_name(name: str) -> None:
    """Set the name of the current call's token."""
    # Each call runs in a task, and therefore in a context, of its own.
    _token_name.set(name)


def token_name() -> str | None:
    """Return the name of the current call's token; None without a token."""
    return _token_name.get(None)


def caller_of(context: Any) -> str:
    """Return the caller: the name of the call's token, else its peer, which is one connection."""
    return _token_name.get(None) or context.peer()


def context_of(context: Context, priority: int = 0, timeout_s: float = 0.0) -> RequestContext:
    """Return the scheduling context of a request.

    Args:
        context: of the call, with its deadline and caller.
        priority: 1 to ``PRIORITIES``, or 0 for the default.
        timeout_s: seconds from now after which the response is useless, or 0 for no limit beside
            the deadline.

    Raises:
        InvalidArgumentError: priority or timeout_s is out of range.
    """
    if not 0 <= priority <= PRIORITIES:
        raise InvalidArgumentError("priority", f"1 to {PRIORITIES}, or 0", priority)
    remaining_s = context.time_remaining()
    left_s = None if remaining_s is None else unrounded_s(remaining_s)
    if timeout_s:
        if not 0 < timeout_s < math.inf:
            raise InvalidArgumentError("timeout_s", "a positive number of seconds, or 0", timeout_s)
        left_s = timeout_s if left_s is None else min(left_s, timeout_s)
    deadline = math.inf if left_s is None else time.monotonic() + left_s
    call = CALL.get()
    trace = None if call is None else call.trace
    caller = partial(caller_of, context)
    return RequestContext(deadline, priority or DEFAULT_PRIORITY, caller, trace)


def check_cancelled() -> asyncio.Task[Any]:
    """Return the current task.

    Called after each read and write: nothing else raises the cancellation in a task that only reads
    or writes.

    Raises:
        CancelledError: The task was cancelled.
    """
    task = asyncio.current_task()
    assert task is not None
    if task.cancelling():
        # The task keeps the exception, whose traceback references this frame: a cycle.
        del task
        raise asyncio.CancelledError("the client has disconnected")
    return task


def unrounded_s(left_s: float) -> float:
    """Return a lower bound of the time that the client of a call still waits.

    gRPC rounds a timeout up to a multiple of 1 ms below 1 s, of 10 ms below 10 s, and so on: by
    at most 1 % (``Timeout`` of its core, transport/timeout_encoding.cc). The timeouts of
    implementations that send more digits are underestimated by as much.

    Args:
        left_s: until the deadline as the server received it.
    """
    unit_s = _FINEST_S
    while left_s > _IN_TRANSIT * _DIGITS * unit_s:
        unit_s *= 10
    return left_s - unit_s


def _ids(context: Context, trace_id: str | None) -> dict[str, str]:
    """Return the caller's ``x-request-id`` or a new one, and the trace id of a traced call."""
    metadata = dict(context.invocation_metadata() or ())
    ids = {"request_id": metadata.get("x-request-id", "")[:_REQUEST_ID_LENGTH] or uuid.uuid4().hex}
    if caller := _TRACEPARENT.match(metadata.get("traceparent", "")):
        ids["trace_id"] = caller[1]
    elif trace_id is not None:
        ids["trace_id"] = trace_id
    return ids
