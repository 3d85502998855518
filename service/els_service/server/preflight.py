"""Validation of settings as at a start, without loading models."""

from __future__ import annotations

from els_service.config import Settings
from els_service.denoisers.files import check_temporary_folder
from els_service.errors import LoadError
from els_service.server.addresses import bind_error, with_port
from els_service.server.security.access import AccessControl, metrics_host
from els_service.server.telemetry import tracing_maker
from els_service.server.web import check_installed

_PORTS = ("port", "metrics_port", "health_port", "http_port")
_PRIVILEGED = 1024
"""Ports below may need privileges."""


def check_settings(settings: Settings) -> None:
    """Check that a server could start here with these settings; ports may be in use.

    Raises:
        LoadError: It could not; names the setting, or TMPDIR.
    """
    check_temporary_folder()
    AccessControl(settings)
    _check_ports(settings)
    _check_addresses(settings)
    tracing_maker(settings)
    check_installed(settings)
    if settings.device == "cuda":
        # Imports torch, which takes seconds.
        from els_service.engine.device import choose_devices

        choose_devices(settings.device)


def _check_addresses(settings: Settings) -> None:
    metrics = metrics_host(settings)
    for name, host in (("host", settings.host), ("metrics_host", metrics)):
        if reason := bind_error(host, 0):
            raise LoadError(name, f"expected an address of this machine, got {host}: {reason}")
    own = with_port(settings.host)
    for name, host in zip(_PORTS, (settings.host, metrics, own, own), strict=True):
        port = getattr(settings, name) or 0
        # Only these are tried: a trial occupies a port for a moment.
        if port < _PRIVILEGED and (reason := bind_error(host, port, in_use_ok=True)):
            raise LoadError(name, f"expected a port that this user may bind, got {port}: {reason}")


def _check_ports(settings: Settings) -> None:
    used: dict[int, str] = {}
    for name in _PORTS:
        port = getattr(settings, name)
        if port and port in used:
            raise LoadError(name, f"expected another port than {used[port]}, got {port} for both")
        used[port] = name
