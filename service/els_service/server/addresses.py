"""Addresses of servers and callers: parsing, binding, and whether they are local.

An address is a host with a port, or ``unix:PATH``: a Unix socket, whose file permissions determine
who may connect.
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
    """Return whether a host is a Unix socket."""
    return host.startswith(UNIX)


def address_of(host: str, port: int) -> str:
    """Return the address in gRPC's notation, for example ``[::1]:50051``."""
    if is_unix(host):
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def with_port(host: str) -> str:
    """Return a host that can have a port: loopback in place of a Unix socket."""
    return _LOOPBACK if is_unix(host) else host


def is_loopback(host: str) -> bool:
    """Return whether a host is reachable from this machine only.

    Raises:
        LoadError: The host has no address.
    """
    if is_unix(host):
        return True
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError as error:
        expected = "expected an address, or a resolvable name"
        raise LoadError("host", f"{expected}, got {host}: {error.strerror}") from error
    return all(map(_is_loopback_address, found))


def is_loopback_name(host: str) -> bool:
    """Return whether a name or address is loopback's, without resolving it."""
    name = host.lower().rstrip(".")
    return name == "localhost" or name.endswith(".localhost") or _is_loopback_address(host)


def is_local(peer: str) -> bool:
    """Return whether a peer is on this machine.

    Args:
        peer: in gRPC's notation: ``ipv4:127.0.0.1:5``, ``ipv6:%5B::1%5D:5``, ``unix:``.
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
    """Bind a gRPC server to an address, and return the port; 0 for a Unix socket.

    Args:
        add: binds the server to an address; returns 0 or raises RuntimeError on failure.
        host: name or address, or ``unix:PATH``.
        port: 0 chooses a free one.

    Raises:
        LoadError: The address cannot be bound; gives the reason.
    """
    address, bound = address_of(host, port), 0
    reason = ""
    if is_unix(host):
        # gRPC would take over the Unix socket of a running server.
        reason = _unix_owner_error(host.removeprefix(UNIX)) or bind_error(host, port)
    try:
        bound = 0 if reason else add(address)
    except RuntimeError:
        bound = 0
    if not bound:
        # gRPC does not report the system's reason.
        reason = (
            reason
            or bind_error(host, port)
            or "the port is in use or the host is not of this machine"
        )
        raise LoadError(address, f"cannot listen: {reason}")
    return 0 if is_unix(host) else bound


def listening_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address; both stacks for one of IPv6.

    Raises:
        OSError: The address cannot be bound.
    """
    family, *_, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
    return socket.create_server(address[:2], family=family, dualstack_ipv6=both)


def bind_error(host: str, port: int, *, in_use_ok: bool = False) -> str:
    """Return why an address cannot be bound; empty if it can.

    Args:
        host: as of ``bind``.
        port: as of ``bind``.
        in_use_ok: whether an address in use is acceptable.
    """
    six = ":" in host
    family = socket.AF_INET6 if six else socket.AF_INET
    try:
        if is_unix(host):
            return _unix_bind_error(host.removeprefix(UNIX))
        # Both stacks, as gRPC: otherwise ::ffff:127.0.0.1 is not an address.
        dual = six and socket.has_dualstack_ipv6()
        socket.create_server((host, port), family=family, dualstack_ipv6=dual).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE and in_use_ok:
            return ""
        return error.strerror or str(error)
    return ""


def _unix_owner_error(path: str) -> str:
    """Return why a Unix socket cannot be replaced; empty if no server listens on it.

    Only a refused connection shows that: one that is forbidden, or would block as the server is
    busy, belongs to a running server.
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
