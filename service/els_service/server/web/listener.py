"""Listener of the HTTP port: uvicorn on the server's event loop, with limits that it lacks."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import orjson
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from els_service.config import Settings

_HEAD_BYTES = 16 << 10
"""Maximum size of a request's line and headers that arrive in several parts."""
_PIPELINED = 16
"""Maximum requests that wait for the response to an earlier one of their connection."""
_CHUNKS, _LEAST_CHUNK_BYTES = 1024, 64
"""Chunks of a body after which their mean size has a minimum: each costs the event loop some
microseconds."""
_CLOSE_S = 1.0


@dataclass(frozen=True)
class _Limits:
    """Limits of connections."""

    connections: int
    head_s: float
    age_s: float
    dead_s: float


class Listener:
    """Listener of an application.

    Args:
        app: ASGI application.
        listening: bound socket.
        context: of TLS; None for plain HTTP.
        settings: of the server.
    """

    def __init__(
        self,
        app: ASGIApp,
        listening: socket.socket,
        context: ssl.SSLContext | None,
        settings: Settings,
    ) -> None:
        limits = _Limits(
            settings.max_connections,
            settings.handshake_s,
            settings.max_connection_age_s,
            settings.keepalive_s + settings.keepalive_timeout_s,
        )
        self._listening = listening
        self._config = uvicorn.Config(
            app,
            http=type("Connection", (_Connection,), {"limits": limits}),
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            # Below error level each malformed request would write a warning.
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=math.ceil(settings.max_connection_idle_s),
            timeout_graceful_shutdown=math.ceil(settings.drain_s + _CLOSE_S),
            reset_contextvars=True,
            ssl_context_factory=None if context is None else lambda *_: context,
        )
        self._server = _Server(self._config, settings.handshake_s)
        self._task: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """Port as bound."""
        return int(self._listening.getsockname()[1])

    def start(self) -> None:
        """Accept connections from the next turn of the event loop."""
        self._task = asyncio.create_task(self._server.serve([self._listening]))

    def stop(self) -> None:
        """Accept no more connections, and close each one after its response."""
        self._server.should_exit = True

    async def close(self) -> None:
        """Wait until the connections have ended; cancel what is left."""
        self.stop()
        if self._task is None:
            self._listening.close()
            return
        for task in list(self._server.server_state.tasks):
            task.cancel()
        self._server.force_exit = True
        await self._task


class _Server(uvicorn.Server):
    """Server that leaves signals to its process, and limits the time of handshakes.

    Args:
        config: of uvicorn.
        handshake_s: seconds that the handshake of TLS may take.
    """

    def __init__(self, config: uvicorn.Config, handshake_s: float) -> None:
        super().__init__(config)
        self._handshake_s = handshake_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections on sockets; the inherited method has no limit of handshakes."""
        await self.lifespan.startup()
        config, loop = self.config, asyncio.get_running_loop()
        connection = partial(
            cast(Any, config.http_protocol_class),
            config=config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )
        limit_s = None if config.ssl is None else self._handshake_s
        self.servers = [
            await loop.create_server(
                connection,
                sock=each,
                ssl=config.ssl,
                backlog=config.backlog,
                ssl_handshake_timeout=limit_s,
            )
            for each in sockets or ()
        ]
        self.started = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture nothing."""
        yield


class _TooManyError(Exception):
    """Too many requests in a row, or chunks of a body; ends the parser's work at once."""


class _Connection(HttpToolsProtocol):
    """One HTTP connection, with limits of number, age, and time and size of what is no body."""

    limits: _Limits
    _timer: asyncio.TimerHandle | None = None
    _in_head = True
    _head = 0
    """Bytes received since the last part of a body, or the start of a head."""
    _chunks = _body = 0
    _since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Accept a connection; close it if there are too many."""
        # That of a stream; uvloop's is of no class of asyncio.
        transport = cast(asyncio.Transport, transport)
        super().connection_made(transport)
        self._since = self.loop.time()
        self._restart()
        _detect_dead(transport, self.limits.dead_s)
        if len(self.connections) > self.limits.connections:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the time limit of a closed connection."""
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse data; reject a head, an extension of a chunk, or trailers that are too large."""
        self._head += len(data)
        super().data_received(data)
        if self._head > _HEAD_BYTES and not self.transport.is_closing():
            self._refuse(431, f"headers: expected at most {_HEAD_BYTES} bytes, got more")

    def on_message_begin(self) -> None:
        """Start the time limit of a head."""
        self._in_head, self._head = True, 0
        self._chunks = self._body = 0
        self._restart()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; trailers, which come after the body, are ignored."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin a request."""
        self._in_head = False
        self._stop()
        if len(self.pipeline) >= _PIPELINED:
            raise _TooManyError
        super().on_headers_complete()
        if self.loop.time() - self._since > self.limits.age_s:
            self.cycle.keep_alive = False

    def on_chunk_header(self) -> None:
        """Count a chunk; called by the parser, also for the last, which is empty."""
        self._head = 0
        self._chunks += 1
        if self._chunks > _CHUNKS and self._body < _LEAST_CHUNK_BYTES * self._chunks:
            raise _TooManyError

    def on_body(self, body: bytes) -> None:
        """Receive a part of a body."""
        self._head = 0
        self._body += len(body)
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """Reject a malformed request; if a response has begun, only close the connection."""
        self._refuse(400, f"request: expected HTTP/1.1, got another ({msg})")

    def _refuse(self, status: int, text: str) -> None:
        begun = self.cycle is not None and not self.cycle.response_complete
        if begun:
            self.transport.abort()
            return
        body = orjson.dumps({"error": text})
        head = (
            f"HTTP/1.1 {status} \r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _restart(self) -> None:
        self._stop()
        self._timer = self.loop.call_later(self.limits.head_s, self.transport.abort)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _detect_dead(transport: Any, seconds: float) -> None:
    """Close the connection of a peer that acknowledges nothing for some time."""
    connection = transport.get_extra_info("socket")
    if connection is None:
        return
    with contextlib.suppress(OSError):  # it was closed in the meantime
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        interval = max(1, round(seconds / 4))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, interval)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1e3 * seconds))
