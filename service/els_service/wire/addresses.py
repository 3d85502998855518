"""Addresses of servers and callers: how they are written, and which are this machine's alone.

An address is a host with a port, or ``unix:PATH``: a socket in the file system, whose permissions
say who may connect.
"""

from __future__ import annotations

import socket
from ipaddress import IPv6Address, ip_address
from urllib.parse import unquote

from els_service.errors import LoadError

UNIX = "unix:"
_LOOPBACK = "127.0.0.1"


def is_unix(host: str) -> bool:
    """Return whether a host is a socket in the file system."""
    return host.startswith(UNIX)


def address_of(host: str, port: int) -> str:
    """Return how gRPC writes the address, ``[::1]:50051`` for example."""
    if is_unix(host):
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def with_port(host: str) -> str:
    """Return the host of what needs a port: loopback where a socket of the file system has none."""
    return _LOOPBACK if is_unix(host) else host


def is_loopback(host: str) -> bool:
    """Return whether nobody can reach a host but from this machine.

    Raises:
        LoadError: It has no address.
    """
    if is_unix(host):
        return True
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError as error:
        expected = "expected an address, or a name that has one"
        raise LoadError("host", f"{expected}, got {host}: {error.strerror}") from error
    return all(map(_is_loopback_address, found))


def is_loopback_name(host: str) -> bool:
    """Return whether a name or address is loopback's as it stands; nobody is asked for it."""
    name = host.lower().rstrip(".")
    return name == "localhost" or name.endswith(".localhost") or _is_loopback_address(host)


def is_local(peer: str) -> bool:
    """Return whether a peer is on this machine.

    Args:
        peer: as gRPC tells it: ``ipv4:127.0.0.1:5``, ``ipv6:%5B::1%5D:5``, ``unix:``.
    """
    kind, _, address = peer.partition(":")
    return kind == "unix" or _is_loopback_address(unquote(address).rpartition(":")[0].strip("[]"))


def _is_loopback_address(text: str) -> bool:
    try:
        address = ip_address(text)
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback
