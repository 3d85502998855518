"""Deadlines of clients, corrected for gRPC's rounding of timeouts."""

from __future__ import annotations

_FINEST_S = 1e-3
_DIGITS = 1000
"""A timeout is sent as up to three digits of a unit: 1 ms, 10 ms, 100 ms, and so on."""
_IN_TRANSIT = 0.98
"""Minimum share of its timeout that a call has left on arrival, assumed to determine the unit."""


def unrounded_s(left_s: float) -> float:
    """Return a lower bound of the time that the client of a call still waits.

    gRPC rounds a timeout up to a multiple of 1 ms below 1 s, of 10 ms below 10 s, and so on: by
    at most 1 % (``Timeout`` of its core, transport/timeout_encoding.cc). The timeouts of
    implementations that send more digits are underestimated by as much.

    Args:
        left_s: until the deadline as the server received it.
    """
    unit_s = _FINEST_S
    while left_s > _IN_TRANSIT * _DIGITS * unit_s:
        unit_s *= 10
    return left_s - unit_s
