"""A DNS server on loopback with one name, whose addresses change like those of pods."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from socketserver import BaseRequestHandler, UDPServer
from threading import Thread

NAME = "els-denoise-headless.test"
TTL_S = 5
"""TTL in seconds of a headless service's records in a cluster."""

_HEAD = struct.Struct("!6H")
_FOUND, _NO_SUCH_NAME = 0x8580, 0x8583
_TYPE_A, _CLASS_IN = 1, 1
_QUESTION_AT = 0xC00C
"""A compressed name: pointer to the question after the header."""


class Names(UDPServer):
    """Answers queries for ``NAME`` with ``addresses``.

    Attributes:
        addresses: IPv4 addresses of the ready replicas; replaced by rollouts.
        port: port on 127.0.0.1.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Query)
        self.addresses: tuple[str, ...] = ()
        self.port = int(self.server_address[1])

    @property
    def target(self) -> str:
        """Target for clients, without the port."""
        return f"dns://127.0.0.1:{self.port}/{NAME}"


class _Query(BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, Names)
        query, back = self.request
        back.sendto(answer(query, self.server.addresses), self.client_address)


def answer(query: bytes, addresses: tuple[str, ...]) -> bytes:
    """Return the answer to a DNS query (RFC 1035, section 4) of one question.

    Other names get NXDOMAIN, so that search domains are skipped; types other than A are empty.
    """
    number, *_ = _HEAD.unpack_from(query)
    labels, at = [], _HEAD.size
    while size := query[at]:
        labels.append(query[at + 1 : at + 1 + size].decode().lower())
        at += 1 + size
    question = query[_HEAD.size : at + 5]
    known = ".".join(labels) == NAME
    asks_a = question[-4:] == struct.pack("!2H", _TYPE_A, _CLASS_IN)
    found = addresses if known and asks_a else ()
    head = _HEAD.pack(number, _FOUND if known else _NO_SUCH_NAME, 1, len(found), 0, 0)
    record = struct.pack("!3HIH", _QUESTION_AT, _TYPE_A, _CLASS_IN, TTL_S, 4)
    return head + question + b"".join(record + socket.inet_aton(each) for each in found)


@contextmanager
def serving() -> Iterator[Names]:
    """Yield a name server that answers until the block ends."""
    with Names() as names:
        thread = Thread(target=names.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield names
        finally:
            names.shutdown()
            thread.join()
