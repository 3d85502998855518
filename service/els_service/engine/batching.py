"""Choice of the next batch of a device: which model, and which chunks together.

A batch is complete when more chunks would save little, as its fixed cost is a small part of it,
would make a member late, or have images of another size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from els_service.config import Scheduling
from els_service.engine.loaded_model import Chunk, LoadedModel, PendingRequest

INLINE_S = 1e-4
"""Predicted seconds below which work runs on the event loop, as passing it to a device takes as
long."""
_SHORT_S = 0.01
"""Target seconds of a batch without fixed cost; then other models are served."""
_LAUNCH_SHARE = 0.2
"""Target share of the fixed cost in the time of a batch."""
DELIVERY_S = 0.002
"""Seconds before a deadline by which an answer must be computed, to be delivered in time."""


def next_model(waiting: Iterable[LoadedModel], device: str, now: float) -> LoadedModel | None:
    """Return the model with the most urgent chunk; on a tie, the one with the least device time."""
    here = [loaded for loaded in waiting if device in loaded.denoisers]
    if len(here) < 2:
        return here[0] if here else None
    return min(here, key=lambda loaded: (loaded.queue.next_priority(now), loaded.virtual))


def next_batch(
    loaded: LoadedModel,
    now: float,
    limits: Scheduling,
    expire: Callable[[LoadedModel, PendingRequest, float], None],
) -> list[Chunk]:
    """Take the chunks of the next batch from the queue; drops those that are late."""
    batch: list[Chunk] = []
    estimate, first_deadline = 0.0, float("inf")
    longest = batch_s(loaded, limits)
    upper_bound = loaded.costs.upper_bound if loaded.costs.is_calibrated(now) else _nothing
    until = now + DELIVERY_S
    while chunk := loaded.queue.peek(now):
        deadline = chunk.pending.context.deadline
        if until + upper_bound(chunk.cost) > deadline:
            expire(loaded, chunk.pending, now)
            continue
        together = estimate + chunk.cost
        if batch and (
            chunk.query.pixels.shape[1:] != batch[0].query.pixels.shape[1:]
            or loaded.costs.seconds(together) > longest
            or until + upper_bound(together) > min(first_deadline, deadline)
        ):
            break
        loaded.take(chunk, now)
        batch.append(chunk)
        estimate, first_deadline = together, min(first_deadline, deadline)
    return batch


def batch_s(loaded: LoadedModel, limits: Scheduling) -> float:
    """Return the target seconds of a batch, if enough is waiting."""
    return min(limits.batch_s, max(_SHORT_S, loaded.costs.fixed_s / _LAUNCH_SHARE))


def _nothing(_: float) -> float:
    return 0.0
