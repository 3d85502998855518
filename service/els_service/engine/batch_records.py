"""Records of computed batches for traces, on the wall clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from els_service.engine.request_context import BatchRecord


def batch_record(
    model: str,
    device: str,
    members: Sequence[tuple[object, float]],
    images: int,
    cost: float,
    span: tuple[float, float],
    clock: Callable[[], float],
) -> BatchRecord:
    """Return what is told of a batch.

    Args:
        model: its name.
        device: where it was computed.
        members: each query's ``Terms.trace``, and when it came.
        images: of all members.
        cost: predicted seconds.
        span: when computing began and ended.
        clock: on which all these times are, in seconds.
    """
    offset = _wall_ns(clock)
    began, ended = span
    return BatchRecord(
        model=model,
        device=device,
        started_ns=round(began * 1e9) + offset,
        ended_ns=round(ended * 1e9) + offset,
        images=images,
        cost=cost,
        members=tuple(trace for trace, _ in members),
        queued_ns=tuple(round(since * 1e9) + offset for _, since in members),
    )


def _wall_ns(clock: Callable[[], float]) -> int:
    """Return the wall clock less a clock, by the quickest of three readings: traces are on it.

    On a busy machine a thread may be set aside between the reading of one clock and the other's.
    """
    readings = []
    for _ in range(3):
        before, wall, after = clock(), time.time_ns(), clock()
        readings.append((after - before, wall - round((before + after) / 2 * 1e9)))
    return min(readings)[1]
