"""TCP connections of this process by peer: bytes received, and shutdown.

gRPC reports nothing about a message before it is complete; ``tcpi_bytes_received`` of tcp(7) counts
its bytes.
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
    """Connections of this process by peer, as of the latest ``scan`` of its open files."""

    def __init__(self) -> None:
        self._files: dict[_Address, list[int]] = {}

    def scan(self) -> None:
        """Find the connections; keeps the previous ones if the open files cannot be listed."""
        try:
            names = os.listdir("/proc/self/fd")
        except OSError:
            return  # the limit of open files is reached
        files: dict[_Address, list[int]] = {}
        for name in names:
            address = _peer_of(int(name))
            if address is not None:
                files.setdefault(address, []).append(int(name))
        self._files = files

    def received(self, peer: str) -> int | None:
        """Return the bytes received from a peer; None if it has no known TCP connection.

        A peer may have several connections from one port, to different ports of this process; their
        sum is returned.

        Args:
            peer: in gRPC's notation: ``ipv4:127.0.0.1:5``, ``ipv6:%5B::1%5D:5``, ``unix:``.
        """
        address = _address_of(peer)
        if address is None:
            return None
        files = self._files.get(address, ())
        counts = [_received_of(file) for file in files if _peer_of(file) == address]
        known = [count for count in counts if count is not None]
        return sum(known) if known else None


def shut_down(peer: str) -> None:
    """Close the TCP connections of a peer, which cancels their calls.

    Args:
        peer: as of ``TcpConnections.received``; ignored if it is not a TCP peer.
    """
    address = _address_of(peer)
    connections = TcpConnections()
    connections.scan()
    for file in connections._files.get(address, ()) if address else ():
        try:
            with _borrowed(file) as connection:
                connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            continue  # it was closed in the meantime


def _peer_of(file: int) -> _Address | None:
    try:
        with _borrowed(file) as connection:
            name = connection.getpeername()
            # The peer name of other families, such as netlink, is a number.
            if not isinstance(name, tuple) or not isinstance(name[0], str):
                return None
            return _normalised(name[0], name[1])
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
    """Yield a socket for an open file of gRPC's, without closing it."""
    # With a given family the constructor makes no system call on a file that may not be a socket.
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
