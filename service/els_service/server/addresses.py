"""Addresses of servers and callers: parsing, binding, and whether they are local.

An address is a host with a port, or ``unix:PATH``: a socket in the file system, whose permissions
say who may connect.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable
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


def bind(add: Callable[[str], int], host: str, port: int) -> int:
    """Return the port that a gRPC server now listens on; 0 for a socket of the file system.

    Args:
        add: of the server, takes an address; 0 or RuntimeError where it cannot.
        host: name or address, or ``unix:PATH``.
        port: 0 takes any that is free.

    Raises:
        LoadError: It cannot listen there; says why.
    """
    address, bound = address_of(host, port), 0
    reason = ""
    if is_unix(host):
        # gRPC would take a socket of the file system from the server that listens there.
        reason = _holder(host.removeprefix(UNIX)) or bind_error(host, port)
    try:
        bound = 0 if reason else add(address)
    except RuntimeError:
        bound = 0
    if not bound:
        # grpc does not pass the system's reason on.
        reason = reason or bind_error(host, port) or "the port is in use or the host is not ours"
        raise LoadError(address, f"cannot listen: {reason}")
    return 0 if is_unix(host) else bound


def bind_error(host: str, port: int, *, taken: bool = True) -> str:
    """Return the system's reason for refusing an address; empty where it takes it.

    Args:
        host: as of ``bind``.
        port: as of ``bind``.
        taken: whether it is a reason that somebody listens there.
    """
    six = ":" in host
    family = socket.AF_INET6 if six else socket.AF_INET
    try:
        if is_unix(host):
            return _unix_bind_error(host.removeprefix(UNIX))
        # Both stacks, as gRPC does: ::ffff:127.0.0.1 is an address, too.
        dual = six and socket.has_dualstack_ipv6()
        socket.create_server((host, port), family=family, dualstack_ipv6=dual).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE and not taken:
            return ""
        return error.strerror or str(error)
    return ""


def _holder(path: str) -> str:
    """Return why a socket of the file system has to be left to another; empty where it is dead.

    Only a refused connection tells that nobody listens: one that may not be made, or has to wait as
    its server is busy, is a living server's.
    """
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            number = probe.connect_ex(path)
        except OSError:
            return ""  # the path is too long
    if number in (0, errno.EAGAIN):
        number = errno.EADDRINUSE
    return "" if number in (errno.ECONNREFUSED, errno.ENOENT) else os.strerror(number)


def _unix_bind_error(path: str) -> str:
    if os.path.lexists(path):
        return "" if stat.S_ISSOCK(os.lstat(path).st_mode) else os.strerror(errno.EEXIST)
    with socket.socket(socket.AF_UNIX) as probe:
        probe.bind(path)
    os.unlink(path)
    return ""
