"""Classifier-free guidance by label, for models that also answer without one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from els_service.denoisers.base import Denoised, Query, concatenate
from els_service.denoisers.gradients import Product
from els_service.denoisers.levels import NoiseLevel


def denoise_guided(denoise: Callable[[Query], Denoised], query: Query) -> Denoised:
    """Return D(no label) + g·(D(label) - D(no label)) (Ho & Salimans 2022, eq. 6), one batch.

    Args:
        denoise: of a model, for queries without guidance.
        query: with guidance; images whose g is 1 are computed once.
    """
    both, rows = _with_unlabelled(query)
    pixels = denoise(both).pixels
    return Denoised(_combined(pixels, query, rows), None)


def product_guided(
    product: Callable[[Query, npt.NDArray[np.float32]], Product],
    query: Query,
    along: npt.NDArray[np.float32],
) -> Product:
    """Return the product with the Jacobian of ``denoise_guided``'s D, which is linear in D.

    Args:
        product: of a model, for queries without guidance.
        query: with guidance.
        along: cotangent or tangent, [B, C, H, W].
    """
    both, rows = _with_unlabelled(query)
    found = product(both, np.concatenate([along, along[rows]]))
    return Product(_combined(found.mean, query, rows), _combined(found.product, query, rows))


def _with_unlabelled(query: Query) -> tuple[Query, npt.NDArray[np.intp]]:
    """Return the query without guidance, then its guided images without labels; and their rows."""
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
    return concatenate([plain, without]), rows


def _combined(
    both: npt.NDArray[np.float32], query: Query, rows: npt.NDArray[np.intp]
) -> npt.NDArray[np.float32]:
    assert query.guidance is not None
    given, without = both[: len(query)], both[len(query) :]
    weight = query.guidance[rows].astype(np.float32)[:, None, None, None]
    given[rows] = without + weight * (given[rows] - without)
    return given
