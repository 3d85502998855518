"""Median ratio of pairs with a bootstrap interval, for small differences of noisy rounds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_RESAMPLES = 10_000


def ratio_of_pairs(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Return the median of ours/theirs, and the ends of its 95 % percentile bootstrap interval.

    Args:
        ours: a number for each round.
        theirs: the other number of the same rounds.

    Raises:
        ValueError: The rounds do not pair up, or there are none.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"expected rounds in pairs, got {len(ours)} and {len(theirs)}")
    ratios = np.array(ours) / np.array(theirs)
    drawn = np.random.default_rng(0).choice(ratios, (_RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return float(np.median(ratios)), float(low), float(high)
