"""Batches of a UNet: the images of each launch, their guidance, and the conditions of its rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from els_service.denoisers.base import Condition, Query
from els_service.denoisers.engines.probe import Array

_LARGEST_BATCH = 16
"""Maximum rows of a launch; a larger one is not faster and needs more memory."""


def launches_of(query: Query) -> Iterator[slice]:
    """Yield slices of images for one launch each: conditions of equal length."""
    first = 0
    lengths = [len(condition.given) for condition in query.conditions] or [0] * len(query)
    for _, group in itertools.groupby(lengths):
        end = first + len(list(group))
        for start in range(first, end, _LARGEST_BATCH):
            yield slice(start, min(start + _LARGEST_BATCH, end))
        first = end


def guidance_of(query: Query) -> dict[int, float]:
    """Return index and guidance of the images that have one, by condition or label."""
    if query.conditions:
        given = [condition.guidance for condition in query.conditions]
    else:
        given = [] if query.guidance is None else query.guidance.tolist()
    return {i: guidance for i, guidance in enumerate(given) if guidance != 1}


def states_of(conditions: Sequence[Condition], guided: Iterable[int]) -> Array:
    """Return the condition of each row, [B + guided, T, W]."""
    others = [conditions[i].unconditional for i in guided]
    given = [condition.given for condition in conditions]
    return np.stack([*given, *(other for other in others if other is not None)])
