"""Measurements of the process: allocator statistics and event-loop lag; trimming of the heap.

Resident memory is larger than what is allocated: malloc keeps freed memory between blocks in use.
After a burst of large messages that may be most of the process, so ``trim_heap`` returns it to the
system. Everything about malloc needs glibc's and does nothing with another.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, cast

LAG_INTERVAL_S = 0.1
TRIM_INTERVAL_S = 2.0
_WORTH_BYTES = 8 << 20
"""Minimum free bytes for a trim: it costs time."""
_BURST_BYTES = 192 << 20
"""Growth of resident memory that causes a trim at the next check."""
_CHECKS = 8
"""Checks for bursts per interval."""
_CALM = 2 * _CHECKS
"""Checks without a burst after which resident and used memory may be compared."""
_PAGE = os.sysconf("SC_PAGE_SIZE")

_M_ARENA_MAX = -8
"""As in glibc's malloc.h."""
_ARENAS = 2
"""One for the event loop, one for all other threads."""


class _Mallinfo2(ctypes.Structure):
    """``struct mallinfo2`` of glibc's malloc.h."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def heap_sizes() -> Iterator[tuple[str, float]]:
    """Yield (metric, value): Python's blocks, bytes allocated by malloc, and bytes free in it.

    malloc's bytes do not include Python's small objects.
    """
    yield "els_python_blocks", sys.getallocatedblocks()
    if (mallinfo := _mallinfo2()) is not None:
        info = mallinfo()
        yield "els_malloc_used_bytes", _used_bytes(info)
        yield "els_malloc_free_bytes", info.fordblks


def limit_arenas() -> None:
    """Limit the number of malloc's arenas; call it before threads start.

    By default malloc creates up to eight per core. Each keeps the memory of its bursts, and only
    the top of the first can be returned to the system.
    """
    mallopt = _malloc_function("mallopt")
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, _ARENAS)


async def trim_heap(interval_s: float = TRIM_INTERVAL_S) -> None:
    """Return freed memory to the system periodically, until cancelled."""
    mallinfo, malloc_trim = _mallinfo2(), _malloc_function("malloc_trim")
    if mallinfo is None or malloc_trim is None:
        return
    least, lowest, checks, calm = 0, _resident_bytes(), 0, _CALM
    while True:
        await asyncio.sleep(interval_s / _CHECKS)
        checks += 1
        resident = _resident_bytes()
        burst = resident - lowest > _BURST_BYTES
        calm = 0 if burst else calm + 1
        if checks % _CHECKS and not burst:
            lowest = min(lowest, resident)
            continue
        # malloc does not report how much of its free memory is resident. The difference of
        # resident and used memory does, plus a constant: memory not allocated by malloc.
        unused = resident - _used_bytes(mallinfo())
        if burst or unused > least + _WORTH_BYTES:
            await asyncio.to_thread(malloc_trim, 0)
            lowest = _resident_bytes()
            unused = lowest - _used_bytes(mallinfo())
            if calm >= _CALM:
                # In a burst the two are of different moments, and one too high would stay.
                least = unused
        least = min(least, unused)


async def watch_loop_lag(
    observe: Callable[[float], None], interval_s: float = LAG_INTERVAL_S
) -> None:
    """Sleep periodically, and observe by how many seconds each sleep was late, until cancelled."""
    while True:
        due = time.monotonic() + interval_s
        await asyncio.sleep(interval_s)
        # The loop's clock has a resolution of a millisecond: a sleep may be early by as much.
        observe(max(0.0, time.monotonic() - due))


def _used_bytes(info: _Mallinfo2) -> int:
    return int(info.uordblks + info.hblkhd)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


@cache
def _mallinfo2() -> Callable[[], _Mallinfo2] | None:
    function: Any = _malloc_function("mallinfo2")  # since glibc 2.33
    if function is not None:
        function.restype = _Mallinfo2
    return cast("Callable[[], _Mallinfo2] | None", function)


def _malloc_function(name: str) -> Any:
    """Return a function of glibc's malloc; None with another allocator."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
