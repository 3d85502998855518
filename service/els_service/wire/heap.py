"""What this process has allocated, as its allocators count it: resident memory counts more."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from functools import cache


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


@cache
def _mallinfo2() -> Callable[[], _Mallinfo2] | None:
    try:
        # From 2.33 on; other libraries have none.
        function = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        return None
    function.restype = _Mallinfo2
    return function
