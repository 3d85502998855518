"""Addresses to listen at: bound, or refused with the system's own reason."""

from __future__ import annotations

import socket
from collections.abc import Callable

from els_service.errors import LoadError


def bind(add: Callable[[str], int], host: str, port: int) -> int:
    """Return the port that a gRPC server now listens on.

    Args:
        add: of the server, takes an address; 0 or RuntimeError where it cannot.
        host: name or address.
        port: 0 takes any that is free.

    Raises:
        LoadError: It cannot listen there; says why.
    """
    address = f"{bracketed(host)}:{port}"
    try:
        bound = add(address)
    except RuntimeError:
        bound = 0
    if not bound:
        # grpc does not pass the system's reason on.
        reason = why_not(host, port) or "the port is in use or the host is not ours"
        raise LoadError(address, f"cannot listen: {reason}")
    return bound


def why_not(host: str, port: int) -> str:
    """Return the system's reason for refusing an address; empty where it takes it."""
    six = ":" in host
    family = socket.AF_INET6 if six else socket.AF_INET
    try:
        # Both stacks, as gRPC does: ::ffff:127.0.0.1 is an address, too.
        dual = six and socket.has_dualstack_ipv6()
        socket.create_server((host, port), family=family, dualstack_ipv6=dual).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def bracketed(host: str) -> str:
    """Return a host as it stands before a port."""
    return f"[{host}]" if ":" in host else host
