"""Scheduling context of a call: deadline, priority, caller, trace."""

from __future__ import annotations

import math
import time
from functools import partial

from els_service.engine.request_context import DEFAULT_PRIORITY, PRIORITIES, RequestContext
from els_service.errors import InvalidArgumentError
from els_service.server.transport.caller import caller_of
from els_service.server.transport.deadlines import unrounded_s
from els_service.server.transport.interceptor import Context, current_trace


def context_of(context: Context, priority: int = 0, timeout_s: float = 0.0) -> RequestContext:
    """Return the terms of a request.

    Args:
        context: of the call: its deadline counts, and its caller.
        priority: 1 to ``PRIORITIES``, or 0 for the default.
        timeout_s: seconds from now after which the answer is of no use, or 0 for none.

    Raises:
        InvalidArgumentError: priority or timeout_s is out of range.
    """
    if not 0 <= priority <= PRIORITIES:
        raise InvalidArgumentError("priority", f"1 to {PRIORITIES}, or 0", priority)
    told = context.time_remaining()
    left = None if told is None else unrounded_s(told)
    if timeout_s:
        if not 0 < timeout_s < math.inf:
            raise InvalidArgumentError("timeout_s", "a positive number of seconds, or 0", timeout_s)
        left = timeout_s if left is None else min(left, timeout_s)
    deadline = math.inf if left is None else time.monotonic() + left
    caller = partial(caller_of, context)
    return RequestContext(deadline, priority or DEFAULT_PRIORITY, caller, current_trace())
