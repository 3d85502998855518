"""Settings judged as a server would at its start, but for its models: those it judges itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from els_service.config import Settings
from els_service.denoisers.files import check_temporary_folder
from els_service.errors import LoadError
from els_service.wire.addresses import with_port
from els_service.wire.doors import Doors, metrics_host
from els_service.wire.listening import why_not

if TYPE_CHECKING:
    from els_service.wire.tracing import Tracing

_PORTS = ("port", "metrics_port", "health_port")
_PRIVILEGED = 1024
"""Ports below may be root's."""


def check_settings(settings: Settings) -> None:
    """Return if a server would start here with these settings, whatever listens at the moment.

    Raises:
        LoadError: It would not; names the setting, or TMPDIR.
    """
    check_temporary_folder()
    Doors(settings)
    _check_ports(settings)
    _check_addresses(settings)
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


def _check_addresses(settings: Settings) -> None:
    metrics = metrics_host(settings)
    for name, host in (("host", settings.host), ("metrics_host", metrics)):
        if reason := why_not(host, 0):
            raise LoadError(name, f"expected an address of this machine, got {host}: {reason}")
    for name, host in zip(_PORTS, (settings.host, metrics, with_port(settings.host)), strict=True):
        port = getattr(settings, name) or 0
        # Others are everybody's; to try one is to take it for a moment.
        if port < _PRIVILEGED and (reason := why_not(host, port, taken=False)):
            raise LoadError(name, f"expected a port that this user may take, got {port}: {reason}")


def _check_ports(settings: Settings) -> None:
    taken: dict[int, str] = {}
    for name in _PORTS:
        port = getattr(settings, name)
        if port and port in taken:
            raise LoadError(name, f"expected another port than {taken[port]}, got {port} for both")
        taken[port] = name
