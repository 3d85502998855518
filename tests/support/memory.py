"""Memory of the arrays that an object holds, numpy's and torch's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor


def array_bytes(holder: object) -> int:
    """Return the bytes of all arrays that are reached from an object; shared memory counts once."""
    total, end = 0, 0
    for first, last in sorted(set(_extents(holder, set()))):
        total += max(0, last - max(first, end))
        end = max(end, last)
    return total


def _extents(holder: object, seen: set[int]) -> Iterator[tuple[int, int]]:
    """Yield first and last address of each array."""
    if id(holder) in seen:
        return
    seen.add(id(holder))
    if isinstance(holder, Tensor):
        storage = holder.untyped_storage()
        yield storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    elif isinstance(holder, np.ndarray):
        owner: Any = holder
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        first = owner.__array_interface__["data"][0]
        yield first, first + owner.nbytes
    else:
        for part in _parts(holder):
            yield from _extents(part, seen)


def _parts(holder: object) -> Iterator[object]:
    if isinstance(holder, dict):
        yield from holder.values()
    elif isinstance(holder, list | tuple | set):
        yield from holder
    elif type(holder).__module__.startswith("els_"):
        yield from getattr(holder, "__dict__", {}).values()
