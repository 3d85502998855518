"""Route of a channel to its target, directly or through a proxy, for error messages."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Self
from urllib.parse import SplitResult, unquote, urlsplit

_PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
"""Proxy variables in gRPC's order: the first that is set counts, even if empty."""
_EXEMPT_VARIABLES = ("no_grpc_proxy", "no_proxy")
_UNIX_SCHEMES = ("unix", "unix-abstract", "vsock")
_SCHEMES = (*_UNIX_SCHEMES, "dns", "ipv4", "ipv6", "xds")
_REFUSED = re.compile(r"Connection refused|unix:.*No such file or directory")
_NOT_CONNECTED = re.compile(r"failed to connect|backends failing|errors resolving|HTTP proxy")
# Texts of gRPC (or the code without a text) for calls that the client itself ended.
_LATE = re.compile(r"Deadline[ _]Exceeded", re.IGNORECASE)


@dataclass(frozen=True)
class Route:
    """Route to a target, by the environment at the time the channel is opened.

    Attributes:
        target: Target as given to the client.
        is_local: Whether the target is on this machine: loopback, or a Unix socket.
        proxy: Address of the HTTP proxy used by gRPC, without credentials; empty for none.
        variable: Environment variable of the proxy.
    """

    target: str
    is_local: bool
    proxy: str = ""
    variable: str = ""

    @classmethod
    def to(cls, target: str) -> Self:
        """Return the route to a target; targets on this machine never use a proxy."""
        scheme, hosts = _parsed(target)
        if scheme in _UNIX_SCHEMES or all(map(_is_loopback, hosts)):
            return cls(target, is_local=True)
        variable = next((name for name in _PROXY_VARIABLES if name in os.environ), "")
        proxy = _address_of(os.environ.get(variable, ""))
        if not proxy or all(map(_is_exempt, hosts)):
            return cls(target, is_local=False)
        return cls(target, False, proxy, variable)

    def explained(self, code: str, message: str, timeout_s: float | None = None) -> str:
        """Return the text of an error, with advice if no server was reached.

        Args:
            code: Name of the status.
            message: Text of the status, or its code if empty.
            timeout_s: Deadline of the whole call in seconds, if known.
        """
        if code == "DEADLINE_EXCEEDED" and _LATE.fullmatch(message):
            if timeout_s is not None:
                message = f"no answer within the {timeout_s:.6g} s allowed: raise timeout_s"
                message += " (--timeout)"
            return f"{message} ({self._through()})" if self.proxy else message
        if code != "UNAVAILABLE" or not _NOT_CONNECTED.search(message):
            return message
        if self.proxy:
            return f"{self._through()}: {message}"
        if _REFUSED.search(message):
            return f"nothing listens at {self.target}. Is els-server running? ({message})"
        return message

    def _through(self) -> str:
        exempt = f"no_proxy exempts hosts; {self.target} is not among them"
        return f"through the proxy {self.proxy} of {self.variable} ({exempt})"


def _parsed(target: str) -> tuple[str, list[str]]:
    """Return scheme and hosts of a target in gRPC's syntax; a bare host has the scheme dns."""
    scheme, _, rest = target.partition(":")
    if scheme not in _SCHEMES:
        scheme, rest = "dns", target
    elif rest.startswith("//"):
        # Between the slashes is the authority that resolves the name.
        rest = rest[2:].partition("/")[2]
    parts = rest.split(",") if scheme in ("ipv4", "ipv6") else [rest]
    return scheme, [_host(unquote(part)) for part in parts]


def _host(endpoint: str) -> str:
    """Return the host of ``host``, ``host:port`` or ``[address]:port``."""
    if endpoint.startswith("["):
        return endpoint[1:].partition("]")[0]
    return endpoint.partition(":")[0] if endpoint.count(":") == 1 else endpoint


def _is_loopback(host: str) -> bool:
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    # Connections to the unspecified address reach this machine.
    return address.is_loopback or address.is_unspecified


def _address_of(url: str) -> str:
    """Return a proxy's address without user and password; empty if gRPC rejects the URL."""
    try:
        parts: SplitResult = urlsplit(url)
    except ValueError:
        return ""
    address = parts.netloc.rpartition("@")[2]
    return f"http://{address}" if parts.scheme == "http" and address else ""


def _is_exempt(host: str) -> bool:
    """Return whether ``no_proxy`` has a suffix of the host, or a network with it."""
    listed = next((os.environ[name] for name in _EXEMPT_VARIABLES if name in os.environ), "")
    entries = [entry.strip().lower() for entry in listed.split(",") if entry]
    return any(host.lower().endswith(entry) or _is_in(host, entry) for entry in entries)


def _is_in(host: str, network: str) -> bool:
    try:
        return ip_address(host) in ip_network(network, strict=False)
    except ValueError:
        return False
