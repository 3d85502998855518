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
    """Return the record of a batch.

    Args:
        model: name of the model.
        device: device that computed it.
        members: ``RequestContext.trace`` and arrival time of each query.
        images: number of images of all members.
        cost: predicted seconds.
        span: begin and end of the computation.
        clock: clock of all these times, in seconds.
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
    """Return the wall clock minus ``clock``, from the quickest of three readings.

    On a busy machine the thread may be preempted between the readings of the two clocks.
    """
    readings = []
    for _ in range(3):
        before, wall, after = clock(), time.time_ns(), clock()
        readings.append((after - before, wall - round((before + after) / 2 * 1e9)))
    return min(readings)[1]
