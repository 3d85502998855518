"""What this process has allocated, as its allocators count it: resident memory counts more."""

from __future__ import annotations

import asyncio
import ctypes
import sys
from collections.abc import Callable, Iterator
from functools import cache

TRIM_EVERY_S = 1.0
_WORTH_BYTES = 64 << 20
"""Freed bytes from which giving them back is worth the time that it takes."""


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
        yield "els_malloc_used_bytes", found.uordblks + found.hblkhd
        yield "els_malloc_free_bytes", found.fordblks


async def trim(interval_s: float = TRIM_EVERY_S) -> None:
    """Give freed memory back to the system, over and over. Ends if cancelled.

    malloc keeps what lies between blocks that are in use; after a burst of large messages that may
    be most of the process. Does nothing where malloc is not glibc's.
    """
    ask, give_back = _mallinfo2(), _malloc_trim()
    if ask is None or give_back is None:
        return
    kept = 0
    while True:
        await asyncio.sleep(interval_s)
        free = ask().fordblks
        # What could not be given back the last time is not tried again and again.
        if free > kept + _WORTH_BYTES:
            await asyncio.to_thread(give_back, 0)
            kept = ask().fordblks
        kept = min(kept, free)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        function: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return function


@cache
def _mallinfo2() -> Callable[[], _Mallinfo2] | None:
    try:
        # From 2.33 on; other libraries have none.
        function = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        return None
    function.restype = _Mallinfo2
    return function
