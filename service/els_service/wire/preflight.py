"""Settings judged as a server would at its start, but for its models: those it judges itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from els_service.config import Settings
from els_service.errors import LoadError
from els_service.wire.doors import Doors, metrics_host
from els_service.wire.listening import why_not

if TYPE_CHECKING:
    from els_service.wire.tracing import Tracing

_PORTS = ("port", "metrics_port", "health_port")


def check_settings(settings: Settings) -> None:
    """Return if a server would start here with these settings, whatever listens at the moment.

    Raises:
        LoadError: It would not; names the setting.
    """
    Doors(settings)
    _check_ports(settings)
    for name, host in (("host", settings.host), ("metrics_host", metrics_host(settings))):
        if reason := why_not(host, 0):
            raise LoadError(name, f"expected an address of this machine, got {host}: {reason}")
    tracing_maker(settings)
    if settings.device == "cuda":
        # Imports torch, which takes seconds.
        from els_service.wire.server import choose_devices

        choose_devices(settings.device)


def tracing_maker(settings: Settings) -> Callable[[], Tracing] | None:
    """Return what makes the maker of spans; nothing of it is imported where nobody takes them.

    Raises:
        LoadError: Traces are asked for, and their extra is not installed.
    """
    if settings.traces is None:
        return None
    try:
        from els_service.wire.tracing import Tracing
    except ImportError as error:
        needs = "expected the extra 'tracing' to be installed: pip install 'els-denoise[tracing]'"
        raise LoadError("traces", f"{needs} ({error})") from error
    return partial(Tracing, settings.traces, settings.traces_ratio)


def _check_ports(settings: Settings) -> None:
    taken: dict[int, str] = {}
    for name in _PORTS:
        port = getattr(settings, name)
        if port and port in taken:
            raise LoadError(name, f"expected another port than {taken[port]}, got {port} for both")
        taken[port] = name
