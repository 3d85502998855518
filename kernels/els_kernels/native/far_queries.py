"""Queries far from a bank, whose sources native logits do not tell apart at low noise.

Native logits have about 31 bits, or 24 where they are float32, for numbers as large as
|x|·|φ|·a/s². A query x = a·φ + s·ε of the bank's own model is no larger than the bank's images, so
that an error of a logit is as small beside the differences of its sources as rounding of the bank
is: only sources that agree to that rounding share weight wrongly. Of a query far outside most of a
logit is common to all sources, and what is left of its bits need not resolve their differences.
Such a query is computed in float64 (``moment_queries``, ``torch_fold``) if a logit may be wrong by
more than ``MOST_ERROR``. The choice depends on the query, its level and the bank alone.
"""

from __future__ import annotations

MOST_ERROR = 0.004
"""Nats that a native logit of a far query may be wrong by. An error of δ moves a mean by at most
w(1 - w)·δ ≤ δ/4 of its sources' spread, by a thousandth here; and roundings of independent numbers
add up to a tenth of their bound: 1e-4."""
_NOISE = 6.0
"""Largest |ε| of a noisy image: 2e-9 of all pixels exceed it."""
_FAR = 2.0
"""Multiple of the largest pixel of the bank's own queries from which a query is far."""
_ROUNDINGS = 8
"""Roundings to float32 that a logit of the plain kernel is wrong by, as its tests allow."""


def is_far(query: float, key: float, a: float, s: float) -> bool:
    """Return whether a query is outside of what noise makes of the bank.

    Args:
        query: largest |pixel| of x, from a times the centre of the bank.
        key: largest |pixel| of the bank, from its centre.
        a: signal scale.
        s: noise scale.
    """
    return query > _FAR * (a * key + _NOISE * s)


def float_error(query: float, key: float, depth: int, a: float, s: float) -> float:
    """Return the nats that a float32 logit of a patch of ``depth`` numbers may be wrong by."""
    largest = depth * (query * (a / s) * key / s + (a / s * key) ** 2 / 2)
    return _ROUNDINGS * 2.0**-24 * largest
