"""Allocator statistics (glibc, CPython), and the return of freed memory to the system."""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, cast

TRIM_EVERY_S = 2.0
_WORTH_BYTES = 8 << 20
"""Freed bytes from which giving them back is worth the time that it takes."""
_BURST_BYTES = 192 << 20
"""Growth of resident memory after which freed memory is returned at the next look."""
_LOOKS = 8
"""Looks in an interval, for bursts."""
_PAGE = os.sysconf("SC_PAGE_SIZE")


_M_ARENA_MAX = -8
"""As in glibc's malloc.h."""
_ARENAS = 2
"""One of the event loop, one of all other threads."""


class _Mallinfo2(ctypes.Structure):
    """``struct mallinfo2`` of glibc's malloc.h."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def sizes() -> Iterator[tuple[str, float]]:
    """Yield (metric, value): Python's blocks; bytes that malloc handed out; bytes that it keeps.

    The bytes only where malloc is glibc's. Python's small objects are no part of them.
    """
    yield "els_python_blocks", sys.getallocatedblocks()
    if (ask := _mallinfo2()) is not None:
        found = ask()
        yield "els_malloc_used_bytes", _used(found)
        yield "els_malloc_free_bytes", found.fordblks


def bound_arenas() -> None:
    """Let malloc make few arenas; called before threads are started.

    It makes up to eight for each core, each keeps what its bursts took, and the end of none but
    the first can be given back. Does nothing where malloc is not glibc's.
    """
    set_option = _malloc_function("mallopt")
    if set_option is not None:
        set_option(_M_ARENA_MAX, _ARENAS)


async def trim(interval_s: float = TRIM_EVERY_S) -> None:
    """Give freed memory back to the system, over and over. Ends if cancelled.

    malloc keeps what lies between blocks that are in use; after a burst of large messages that may
    be most of the process. Does nothing where malloc is not glibc's.
    """
    ask, give_back = _mallinfo2(), _malloc_function("malloc_trim")
    if ask is None or give_back is None:
        return
    least, lowest, looks = 0, _resident(), 0
    while True:
        await asyncio.sleep(interval_s / _LOOKS)
        looks += 1
        resident = _resident()
        burst = resident - lowest > _BURST_BYTES
        if looks % _LOOKS and not burst:
            lowest = min(lowest, resident)
            continue
        # malloc does not report how much of its free memory is resident. Resident memory that is
        # not in use shows it, plus a constant: memory that never was malloc's.
        unused = resident - _used(ask())
        if burst or unused > least + _WORTH_BYTES:
            await asyncio.to_thread(give_back, 0)
            lowest = _resident()
            least = unused = lowest - _used(ask())
        least = min(least, unused)


def _used(found: _Mallinfo2) -> int:
    return int(found.uordblks + found.hblkhd)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


@cache
def _mallinfo2() -> Callable[[], _Mallinfo2] | None:
    function: Any = _malloc_function("mallinfo2")  # from 2.33 on
    if function is not None:
        function.restype = _Mallinfo2
    return cast("Callable[[], _Mallinfo2] | None", function)


def _malloc_function(name: str) -> Any:
    """Return a function of glibc's malloc; None where malloc is another's."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
