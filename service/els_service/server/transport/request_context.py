"""Scheduling context of a request: deadline, priority, caller, trace."""

from __future__ import annotations

import math
import time
from functools import partial

from els_service.engine.request_context import DEFAULT_PRIORITY, PRIORITIES, RequestContext
from els_service.errors import InvalidArgumentError
from els_service.logs import CALL
from els_service.server.transport.caller import caller_of
from els_service.server.transport.deadlines import unrounded_s
from els_service.server.transport.grpc_types import Context


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
