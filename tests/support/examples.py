"""How many examples a property is tried with."""

from __future__ import annotations

from hypothesis import HealthCheck, settings


def examples(count: int) -> settings:
    """Return settings of a property test, to be used as its decorator.

    Args:
        count: of examples; the profile ``ci`` tries half as many, ``nightly`` twenty times.
    """
    return settings(
        max_examples=count * settings().max_examples // 100,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
