"""Bytes that a peer has sent over its TCP connection, as the kernel counts them.

gRPC tells nothing of a message before it is whole, ``tcpi_bytes_received`` of tcp(7) does.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from urllib.parse import unquote

_RECEIVED = struct.Struct("=Q")
_RECEIVED_AT = 128
"""Offset of ``tcpi_bytes_received`` in ``struct tcp_info``."""

_Address = tuple[str, int]


class TcpConnections:
    """Connections of this process, by peer; looked up among its open files."""

    def __init__(self) -> None:
        self._files: dict[_Address, int] = {}

    def received(self, peer: str) -> int | None:
        """Return the bytes received of a peer; None where there is no such TCP connection.

        Args:
            peer: as gRPC writes it: ``ipv4:127.0.0.1:5``, ``ipv6:%5B::1%5D:5``, ``unix:``.
        """
        address = _address_of(peer)
        if address is None:
            return None
        file = self._files.get(address)
        if file is not None and _peer_of(file) == address:
            return _received_of(file)
        self._files = dict(_peers())
        file = self._files.get(address)
        return None if file is None else _received_of(file)


def _peers() -> Iterator[tuple[_Address, int]]:
    for name in os.listdir("/proc/self/fd"):
        address = _peer_of(int(name))
        if address is not None:
            yield address, int(name)


def _peer_of(file: int) -> _Address | None:
    try:
        with _borrowed(file) as connection:
            name = connection.getpeername()
            return _normalised(name[0], name[1]) if isinstance(name, tuple) else None
    except (OSError, ValueError):
        return None


def _received_of(file: int) -> int | None:
    try:
        with _borrowed(file) as connection:
            size = _RECEIVED_AT + _RECEIVED.size
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, size)
    except OSError:
        return None
    return int(_RECEIVED.unpack_from(info, _RECEIVED_AT)[0]) if len(info) == size else None


@contextmanager
def _borrowed(file: int) -> Iterator[socket.socket]:
    """Yield a socket over an open file that stays gRPC's: it is not closed."""
    # The family is given, so that nothing is asked of a file that may be no socket.
    connection = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, 0, fileno=file)
    try:
        yield connection
    finally:
        connection.detach()


def _address_of(peer: str) -> _Address | None:
    kind, _, address = peer.partition(":")
    host, _, port = unquote(address).rpartition(":")
    if kind not in ("ipv4", "ipv6") or not port.isdecimal():
        return None
    try:
        return _normalised(host.strip("[]"), int(port))
    except ValueError:
        return None


def _normalised(host: str, port: int) -> _Address:
    address = ip_address(host.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address), port
