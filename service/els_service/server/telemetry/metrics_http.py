"""HTTP for operators: ``/metrics``, ``/healthz`` and ``/readyz``, from a thread of their own.

The thread has an event loop of its own, so that a scrape does not delay calls, nor calls a scrape.
uvicorn implements HTTP; it has no time limit for requests, so ``_Bounded`` adds limits of time and
connections. Connections use no threads of their own.
"""

from __future__ import annotations

import asyncio
import gzip
import re
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Thread
from typing import Any
from urllib.parse import parse_qs

import h11
import uvicorn
from prometheus_client import CollectorRegistry, exposition
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from uvicorn.protocols.http.h11_impl import H11Protocol

from els_service.server.addresses import listening_socket

_REQUEST_S = 10.0
"""Maximum time from a connection's start, or the end of a request's head, until the response has
been read."""
_IDLE_S = 5
"""Maximum idle time of a connection."""
_CONNECTIONS = 256
"""Maximum connections; beyond it an idle one is closed."""
_HEADER_BYTES = 16 << 10
_QUERY_FIELDS = 100
_CLOSE_S = 1

_PLAIN = "text/plain; charset=utf-8"
_TEXT, _OPENMETRICS = "text/plain", "application/openmetrics-text"
_VERSIONS = {_TEXT: "0.0.4", _OPENMETRICS: "1.0.0"}
"""Media type → version of the supported formats."""
_WILDCARDS = ("*/*", "text/*")
_QUALITY = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")

Headers = list[tuple[bytes, bytes]]


class HttpPages:
    """Listener for ``/metrics``, ``/healthz`` and ``/readyz``.

    ``/healthz`` is 200 while the process runs; ``/readyz`` is 200 while the server is ready, else
    503 with the reason. Other paths are 404, methods other than GET and HEAD 405.

    Args:
        registry: source of ``/metrics``.
        why_not_ready: returns why the server is not ready, or an empty string; called in the
            thread.
        host: address to listen at.
        port: 0 chooses a free one.

    Attributes:
        port: as bound.

    Raises:
        OSError: The port cannot be bound.
    """

    def __init__(
        self, registry: CollectorRegistry, why_not_ready: Callable[[], str], host: str, port: int
    ) -> None:
        listening = listening_socket(host, port)
        self.port: int = listening.getsockname()[1]
        self._pages = _Pages(registry, why_not_ready)
        config = uvicorn.Config(
            self._pages,
            http=_Bounded,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            # Below error level each malformed request would write a warning.
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_IDLE_S,
            timeout_graceful_shutdown=_CLOSE_S,
            h11_max_incomplete_event_size=_HEADER_BYTES,
        )
        self._server = uvicorn.Server(config)
        self._thread = Thread(
            target=self._run, args=(listening,), name="els-metrics-http", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop the listener and its thread; blocks for at most about two seconds."""
        self._server.should_exit = True
        self._thread.join()
        self._pages.close()

    def _run(self, listening: socket.socket) -> None:
        # Some versions of uvicorn leave the socket open if they are stopped while starting.
        with listening, asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
            runner.run(self._server.serve([listening]))


class _Pages:
    """ASGI application of the three paths."""

    def __init__(self, registry: CollectorRegistry, why_not_ready: Callable[[], str]) -> None:
        self._registry, self._why_not_ready = registry, why_not_ready
        self._renderer = ThreadPoolExecutor(1, "els-metrics")
        self._rendering = asyncio.Lock()
        self._pending: dict[tuple[object, ...], asyncio.Future[bytes]] = {}
        """Pages that wait for the renderer, shared by equal requests."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Respond to one request."""
        status, headers, body = await self._respond(scope)
        headers.append((b"content-length", b"%d" % len(body)))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def close(self) -> None:
        """Stop the rendering thread."""
        self._renderer.shutdown(cancel_futures=True)

    async def _respond(self, scope: Any) -> tuple[int, Headers, bytes]:
        path = scope["path"]
        if path not in ("/metrics", "/healthz", "/readyz"):
            return _plain(404, "not found: expected /metrics, /healthz or /readyz")
        if scope["method"] not in ("GET", "HEAD"):
            status, headers, body = _plain(405, "method not allowed: expected GET or HEAD")
            return status, [*headers, (b"allow", b"GET, HEAD")], body
        if path == "/metrics":
            return await self._metrics(scope)
        reason = "" if path == "/healthz" else self._why_not_ready()
        return _plain(503, f"not ready: {reason}") if reason else _plain(200, "ok")

    async def _metrics(self, scope: Any) -> tuple[int, Headers, bytes]:
        try:
            query = parse_qs(scope["query_string"].decode("latin-1"), max_num_fields=_QUERY_FIELDS)
        except ValueError as error:
            return _plain(400, f"query: {error}")
        kind = format_of(_header(scope, b"accept"))
        compressed = accepts_gzip(_header(scope, b"accept-encoding"))
        body = await self._shared_page(kind, compressed, tuple(query.get("name[]", ())))
        content_type = f"{kind}; version={_VERSIONS[kind]}; charset=utf-8"
        headers = [(b"content-type", content_type.encode()), (b"vary", b"Accept, Accept-Encoding")]
        if compressed:
            headers.append((b"content-encoding", b"gzip"))
        return 200, headers, body

    async def _shared_page(self, kind: str, compressed: bool, names: tuple[str, ...]) -> bytes:
        key = kind, compressed, names
        page = self._pending.get(key)
        if page is None:
            page = self._pending[key] = asyncio.ensure_future(
                self._rendered(kind, compressed, names)
            )
        # A disconnecting scraper must not cancel the page for others.
        return await asyncio.shield(page)

    async def _rendered(self, kind: str, compressed: bool, names: tuple[str, ...]) -> bytes:
        async with self._rendering:
            # Later requests need a later page.
            del self._pending[kind, compressed, names]
            loop = asyncio.get_running_loop()
            args = self._registry, kind, compressed, names
            return await loop.run_in_executor(self._renderer, _render, *args)


class _Bounded(H11Protocol):
    """One HTTP connection, with limits that uvicorn lacks.

    A connection is closed if the response to its request has not been sent and read within
    ``_REQUEST_S``. Beyond ``_CONNECTIONS`` a new one replaces the longest idle one of the address
    with most connections.
    """

    _deadline: asyncio.TimerHandle | None = None
    _idle_since = 0.0

    # asyncio declares a wider argument type than TCP connections have.
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection; close another one if there are too many."""
        super().connection_made(transport)
        self._restart()
        if len(self.connections) > _CONNECTIONS:
            self._close_idlest()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the deadline of a closed connection."""
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse data; the time limit of a request starts at the end of its head."""
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._restart()

    def on_response_complete(self) -> None:
        """Restart the time limit for the next request."""
        self._restart()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Reject a malformed request; if a response has begun, only close the connection."""
        try:
            super().send_400_response(msg)
        except h11.LocalProtocolError:
            self.transport.abort()

    def _restart(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._idle_since = self.loop.time()
        # ``abort``, as ``close`` would wait for the peer to read the remaining data.
        self._deadline = self.loop.call_later(_REQUEST_S, self.transport.abort)

    def _close_idlest(self) -> None:
        connections = [one for one in self.connections if isinstance(one, _Bounded)]
        idle = [one for one in connections if one.cycle is None or one.cycle.response_complete]
        held = Counter(one.client and one.client[0] for one in connections)
        oldest = min(
            idle or [self],
            key=lambda one: (-held[one.client and one.client[0]], one._idle_since),
        )
        # Removed at once: further connections may be accepted before its close is noticed.
        self.connections.discard(oldest)
        oldest.transport.abort()


def format_of(accept: str) -> str:
    """Return the media type of the format that an ``Accept`` header prefers.

    OpenMetrics 1.0.0 if its quality is above 0 and at least that of plain text, else plain text
    0.0.4. Other formats, other versions and malformed items are ignored.
    """
    wanted = {_TEXT: 0.0, _OPENMETRICS: 0.0}
    for kind, parameters in _items(accept):
        kind = _TEXT if kind in _WILDCARDS else kind
        if kind in wanted and parameters.get("version", _VERSIONS[kind]) == _VERSIONS[kind]:
            wanted[kind] = max(wanted[kind], _quality(parameters))
    openmetrics_quality = wanted[_OPENMETRICS]
    preferred = openmetrics_quality > 0 and openmetrics_quality >= wanted[_TEXT]
    return _OPENMETRICS if preferred else _TEXT


def accepts_gzip(accept_encoding: str) -> bool:
    """Return whether an ``Accept-Encoding`` header names gzip, with a quality above 0."""
    items = _items(accept_encoding)
    return any(coding == "gzip" and _quality(parameters) > 0 for coding, parameters in items)


def _items(header: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each value of a header in lower case, with its parameters."""
    for item in header.lower().split(","):
        value, *pairs = (part.strip() for part in item.split(";"))
        split = (pair.partition("=") for pair in pairs)
        yield value, {name.strip(): given.strip().strip('"') for name, _, given in split}


def _quality(parameters: dict[str, str]) -> float:
    given = parameters.get("q", "1")
    return float(given) if _QUALITY.fullmatch(given) else 0.0


def _render(
    registry: CollectorRegistry, kind: str, compressed: bool, names: tuple[str, ...]
) -> bytes:
    source: Any = _Selection(registry, names) if names else registry
    write: Any = openmetrics.generate_latest if kind == _OPENMETRICS else exposition.generate_latest
    page: bytes = write(source)
    return gzip.compress(page, 6) if compressed else page


class _Selection(Collector):
    """Samples of a registry by name; the registry's own filter needs described collectors."""

    def __init__(self, registry: CollectorRegistry, names: tuple[str, ...]) -> None:
        self._registry, self._names = registry, frozenset(names)

    def collect(self) -> Iterator[Metric]:
        """Yield the families with such samples, reduced to them."""
        for family in self._registry.collect():
            selected = Metric(family.name, family.documentation, family.type)
            selected.samples = [sample for sample in family.samples if sample.name in self._names]
            if selected.samples:
                yield selected


def _header(scope: Any, name: bytes) -> str:
    values = [value for found, value in scope["headers"] if found == name]
    return b",".join(values).decode("latin-1")


def _plain(status: int, text: str) -> tuple[int, Headers, bytes]:
    return status, [(b"content-type", _PLAIN.encode())], f"{text}\n".encode()
