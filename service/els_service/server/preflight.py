"""Validation of settings the way a start would, without loading models."""

from __future__ import annotations

from els_service.config import Settings
from els_service.denoisers.files import check_temporary_folder
from els_service.errors import LoadError
from els_service.server.addresses import bind_error, with_port
from els_service.server.security.access import AccessControl, metrics_host
from els_service.server.telemetry import tracing_maker

_PORTS = ("port", "metrics_port", "health_port")
_PRIVILEGED = 1024
"""Ports below may be root's."""


def check_settings(settings: Settings) -> None:
    """Return if a server would start here with these settings, whatever listens at the moment.

    Raises:
        LoadError: It would not; names the setting, or TMPDIR.
    """
    check_temporary_folder()
    AccessControl(settings)
    _check_ports(settings)
    _check_addresses(settings)
    tracing_maker(settings)
    if settings.device == "cuda":
        # Imports torch, which takes seconds.
        from els_service.engine.device import choose_devices

        choose_devices(settings.device)


def _check_addresses(settings: Settings) -> None:
    metrics = metrics_host(settings)
    for name, host in (("host", settings.host), ("metrics_host", metrics)):
        if reason := bind_error(host, 0):
            raise LoadError(name, f"expected an address of this machine, got {host}: {reason}")
    for name, host in zip(_PORTS, (settings.host, metrics, with_port(settings.host)), strict=True):
        port = getattr(settings, name) or 0
        # Others are everybody's; to try one is to take it for a moment.
        if port < _PRIVILEGED and (reason := bind_error(host, port, taken=False)):
            raise LoadError(name, f"expected a port that this user may take, got {port}: {reason}")


def _check_ports(settings: Settings) -> None:
    taken: dict[int, str] = {}
    for name in _PORTS:
        port = getattr(settings, name)
        if port and port in taken:
            raise LoadError(name, f"expected another port than {taken[port]}, got {port} for both")
        taken[port] = name
