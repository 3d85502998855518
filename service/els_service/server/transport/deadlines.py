"""Deadlines of callers, corrected for gRPC's rounding of timeouts."""

from __future__ import annotations

_FINEST_S = 1e-3
_DIGITS = 1000
"""A timeout is sent as three digits of milliseconds, of tens of them, of hundreds, and so on."""
_ON_ITS_WAY = 0.98
"""Part of its time that a call has left, at least, where its unit is judged by that."""


def unrounded_s(left_s: float) -> float:
    """Return how long the caller of a call waits at least, by what the server is told.

    gRPC rounds a timeout up to a multiple of 1 ms below 1 s, of 10 ms below 10 s, and so on: by
    1 % at most (``Timeout`` of its core, transport/timeout_encoding.cc). Other implementations send
    more digits; what they tell is taken for less than it is, by as little.

    Args:
        left_s: until the deadline that the server is told.
    """
    unit_s = _FINEST_S
    while left_s > _ON_ITS_WAY * _DIGITS * unit_s:
        unit_s *= 10
    return left_s - unit_s
