"""How a channel reaches its target: directly or through a proxy, and what its failures mean."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Self
from urllib.parse import SplitResult, unquote, urlsplit

_PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
"""As gRPC reads them: the first that is set counts, even where it is empty."""
_EXEMPT_VARIABLES = ("no_grpc_proxy", "no_proxy")
_UNIX_SCHEMES = ("unix", "unix-abstract", "vsock")
_SCHEMES = (*_UNIX_SCHEMES, "dns", "ipv4", "ipv6", "xds")
_REFUSED = re.compile(r"Connection refused|unix:.*No such file or directory")
_NOT_CONNECTED = re.compile(r"failed to connect|backends failing|errors resolving|HTTP proxy")
# What gRPC says, or its code if it says nothing, where the client itself ended the call.
_LATE = re.compile(r"Deadline[ _]Exceeded", re.IGNORECASE)


@dataclass(frozen=True)
class Route:
    """The way to a target, as the environment has it when the channel is opened.

    Attributes:
        target: As the client was told it.
        is_local: Whether all of it is on this machine: loopback, or a socket of the file system.
        proxy: Address of the HTTP proxy that gRPC uses, without credentials; empty for none.
        variable: Name of the environment variable that has it.
    """

    target: str
    is_local: bool
    proxy: str = ""
    variable: str = ""

    @classmethod
    def to(cls, target: str) -> Self:
        """Return the route to a target; what is on this machine never takes a proxy."""
        scheme, hosts = _parsed(target)
        if scheme in _UNIX_SCHEMES or all(map(_is_loopback, hosts)):
            return cls(target, is_local=True)
        variable = next((name for name in _PROXY_VARIABLES if name in os.environ), "")
        proxy = _address_of(os.environ.get(variable, ""))
        if not proxy or all(map(_is_exempt, hosts)):
            return cls(target, is_local=False)
        return cls(target, False, proxy, variable)

    def explained(self, code: str, message: str, timeout_s: float | None = None) -> str:
        """Return the text of an error, with what its caller can do where nothing was reached.

        Args:
            code: Name of the status.
            message: Text of the status; its code where it has none.
            timeout_s: Seconds that the whole call was allowed, where known.
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
        # What stands between the slashes is who resolves the name.
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
    # Whoever connects to the unspecified address reaches this machine.
    return address.is_loopback or address.is_unspecified


def _address_of(url: str) -> str:
    """Return a proxy's address without its user and password; empty where gRPC takes it not."""
    try:
        parts: SplitResult = urlsplit(url)
    except ValueError:
        return ""
    address = parts.netloc.rpartition("@")[2]
    return f"http://{address}" if parts.scheme == "http" and address else ""


def _is_exempt(host: str) -> bool:
    """Return whether ``no_proxy`` has a suffix of the host, or a network that it is in."""
    listed = next((os.environ[name] for name in _EXEMPT_VARIABLES if name in os.environ), "")
    entries = [entry.strip().lower() for entry in listed.split(",") if entry]
    return any(host.lower().endswith(entry) or _is_in(host, entry) for entry in entries)


def _is_in(host: str, network: str) -> bool:
    try:
        return ip_address(host) in ip_network(network, strict=False)
    except ValueError:
        return False
