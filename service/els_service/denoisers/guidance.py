"""Classifier-free guidance by label, for models that also answer without one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from els_service.denoisers.base import Denoised, Query, concatenate
from els_service.denoisers.levels import NoiseLevel


def denoise_guided(denoise: Callable[[Query], Denoised], query: Query) -> Denoised:
    """Return D(no label) + g·(D(label) - D(no label)) (Ho & Salimans 2022, eq. 6), one batch.

    Args:
        denoise: of a model, for queries without guidance.
        query: with guidance; images whose g is 1 are computed once.
    """
    assert query.guidance is not None
    rows = np.flatnonzero(query.guidance != 1)
    plain = Query(query.pixels, query.level, query.labels, query.windows)
    pairs = query.level.pairs
    without = Query(
        query.pixels[rows],
        NoiseLevel.of([pairs[i] for i in rows.tolist()]),
        np.full(len(rows), -1),
        query.windows[rows],
    )
    both = denoise(concatenate([plain, without])).pixels
    mean, other = both[: len(query)], both[len(query) :]
    weight = query.guidance[rows].astype(np.float32)[:, None, None, None]
    mean[rows] = other + weight * (mean[rows] - other)
    return Denoised(mean, None)
