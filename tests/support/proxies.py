"""A real HTTP proxy on loopback: it records what it is asked to connect to, and may refuse."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from threading import Thread


@dataclass
class Proxy:
    """A proxy that tunnels every CONNECT to one port, or refuses with 403 where there is none."""

    address: str
    to_port: int | None
    asked: list[str] = field(default_factory=list)
    """Targets of CONNECT, in their order."""

    @property
    def url(self) -> str:
        """The proxy as a variable of the environment has it, with a password to hide."""
        return f"http://user:secret@{self.address}"

    def serve(self, one: socket.socket) -> None:
        """Answer one connection."""
        with one, suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                if not (data := one.recv(1 << 12)):
                    return
                head += data
            self.asked.append(head.split()[1].decode())
            if self.to_port is None:
                one.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")
                return
            with socket.create_connection(("127.0.0.1", self.to_port), 10) as other:
                one.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                back = Thread(target=_pour, args=(other, one), daemon=True)
                back.start()
                _pour(one, other)
                back.join(10)


def _pour(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)


@contextmanager
def proxying(to_port: int | None = None) -> Iterator[Proxy]:
    """Yield a proxy that listens; afterwards it takes nobody any more."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        proxy = Proxy(f"127.0.0.1:{listening.getsockname()[1]}", to_port)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    one, _ = listening.accept()
                    Thread(target=proxy.serve, args=(one,), daemon=True).start()

        accepting = Thread(target=accept, daemon=True)
        accepting.start()
        try:
            yield proxy
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            accepting.join(10)
