"""Scores of answers, and the check that they are finite."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from els_service.denoisers.base import Query
from els_service.errors import ElsError


def check_finite(values: npt.NDArray[np.float32], source: str, detail: str = "") -> None:
    """Check that an answer is finite; to be called before it is clipped.

    Args:
        values: the answer, in C order.
        source: first words of the error, such as ``the network``.
        detail: its last words.

    Raises:
        ElsError: A value is NaN or infinite.
    """
    flat = values.reshape(-1)
    # One pass without a temporary array; squares may overflow where the values do not. Unlike
    # numpy's element-wise functions, products of vectors never warn of that.
    if not math.isfinite(np.vdot(flat, flat)) and not np.isfinite(flat).all():
        raise ElsError(f"{source} returned NaN or infinity{detail}")


def score(query: Query, mean: Tensor) -> Tensor:
    """Return ∇ log p(x) of D(x) = ``mean``, as ``score_array`` does."""
    return torch.from_numpy(score_array(query, mean.numpy()))


def score_array(query: Query, mean: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return ∇ log p(x) = (a·D(x) - x) / s², [B, C, H, W] float32.

    Tweedie's formula: Efron, "Tweedie's formula and selection bias", 2011.

    Args:
        query: has x.
        mean: D(x), [B, C, H, W].

    Raises:
        ElsError: D(x) is so large that the score is no float32.
    """
    a = per_image([a for a, _ in query.level.pairs])
    precision = per_image([s**-2.0 for _, s in query.level.pairs])
    result = mean * a
    result -= query.pixels
    with np.errstate(over="ignore"):
        result *= precision
    if not np.isfinite(result).all():
        raise ElsError("the score of this answer is too large for float32")
    return result


def per_image(
    values: Sequence[float | npt.NDArray[np.float64]],
) -> np.float32 | npt.NDArray[np.float32]:
    """Return [B, ·, ·, ·] float32 of a value of each image, or what broadcasts to it."""
    if len(values) == 1:
        return np.float32(values[0])
    array = np.array(values, np.float32)
    return array.reshape(array.shape + (1,) * (4 - array.ndim))
