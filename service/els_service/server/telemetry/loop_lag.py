"""Lag of the event loop, which every call waits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

INTERVAL_S = 0.1


async def watch(observe: Callable[[float], None], interval_s: float = INTERVAL_S) -> None:
    """Sleep over and over; tell by how many seconds each sleep was too long. Ends if cancelled."""
    while True:
        due = time.monotonic() + interval_s
        await asyncio.sleep(interval_s)
        # The loop counts in whole milliseconds and may be up to one early.
        observe(max(0.0, time.monotonic() - due))
