"""Addresses to listen at: bound, or refused with the system's own reason."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable

from els_service.errors import LoadError
from els_service.wire.addresses import UNIX, address_of, is_unix


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
        reason = _holder(host.removeprefix(UNIX)) or why_not(host, port)
    try:
        bound = 0 if reason else add(address)
    except RuntimeError:
        bound = 0
    if not bound:
        # grpc does not pass the system's reason on.
        reason = reason or why_not(host, port) or "the port is in use or the host is not ours"
        raise LoadError(address, f"cannot listen: {reason}")
    return 0 if is_unix(host) else bound


def why_not(host: str, port: int, *, taken: bool = True) -> str:
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
            return _why_not_unix(host.removeprefix(UNIX))
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


def _why_not_unix(path: str) -> str:
    if os.path.lexists(path):
        return "" if stat.S_ISSOCK(os.lstat(path).st_mode) else os.strerror(errno.EEXIST)
    with socket.socket(socket.AF_UNIX) as probe:
        probe.bind(path)
    os.unlink(path)
    return ""
