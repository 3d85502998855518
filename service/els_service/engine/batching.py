"""Choice of the next batch of a device: which model, and which chunks together.

A batch ends where more would save little (its launch is a small part of it), or where it would make
a member late.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from els_service.config import Scheduling
from els_service.engine.loaded_model import Chunk, LoadedModel, PendingRequest

INLINE_S = 1e-4
"""Shorter work runs on the event loop: handing it over would take as long."""
_SHORT_S = 0.01
"""Predicted time of a batch whose launch costs nothing: others get their turn after it."""
_LAUNCH_SHARE = 0.2
"""Part of a batch that its launch may be; batches grow until it is."""
HAND_OUT_S = 0.002
"""Of a deadline: an answer that is computed has yet to be handed out."""


def next_model(waiting: Iterable[LoadedModel], device: str, now: float) -> LoadedModel | None:
    """Return the model with the most urgent chunk; of several, the one that had least time."""
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
    """Take from the queue what is worth computing and can be computed in time, together."""
    batch: list[Chunk] = []
    estimate, first_deadline = 0.0, float("inf")
    longest = batch_s(loaded, limits)
    upper_bound = loaded.costs.upper_bound if loaded.costs.is_calibrated(now) else _nothing
    until = now + HAND_OUT_S
    while chunk := loaded.queue.peek(now):
        deadline = chunk.pending.context.deadline
        if until + upper_bound(chunk.cost) > deadline:
            expire(loaded, chunk.pending, now)
            continue
        together = estimate + chunk.cost
        if batch and (
            loaded.costs.seconds(together) > longest
            or until + upper_bound(together) > min(first_deadline, deadline)
        ):
            break
        loaded.take(chunk, now)
        batch.append(chunk)
        estimate, first_deadline = together, min(first_deadline, deadline)
    return batch


def batch_s(loaded: LoadedModel, limits: Scheduling) -> float:
    """Return the predicted time that a batch should take, if there is so much to do."""
    return min(limits.batch_s, max(_SHORT_S, loaded.costs.fixed_s / _LAUNCH_SHARE))


def _nothing(_: float) -> float:
    return 0.0
