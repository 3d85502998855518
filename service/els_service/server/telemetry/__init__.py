"""Metrics, traces and process measurements."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from els_service.config import Settings
from els_service.errors import LoadError

if TYPE_CHECKING:
    from els_service.server.telemetry.tracing import Tracing


def tracing_maker(settings: Settings) -> Callable[[], Tracing] | None:
    """Return a factory for ``Tracing``, or None; imports OpenTelemetry only if tracing is on.

    Raises:
        LoadError: Tracing is on, and its extra is not installed.
    """
    if settings.traces is None:
        return None
    try:
        from els_service.server.telemetry.tracing import Tracing
    except ImportError as error:
        needs = "expected the extra 'tracing' to be installed: pip install 'els-denoise[tracing]'"
        raise LoadError("traces", f"{needs} ({error})") from error
    return partial(Tracing, settings.traces, settings.traces_ratio)
