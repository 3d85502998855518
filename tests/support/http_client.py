"""Requests to the HTTP port of a server, on a connection that is kept."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Reply:
    """Status, headers with lower-case names, and body of a response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """Content of the body."""
        return json.loads(self.body)

    @property
    def lines(self) -> list[Any]:
        """Content of each line of the body."""
        return [json.loads(line) for line in self.body.splitlines()]


@dataclass
class HttpClient:
    """Client of one server.

    Args:
        port: of the server, on loopback.
        context: of TLS; None for plain HTTP.
        headers: of every request.
    """

    port: int
    context: ssl.SSLContext | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._connection: http.client.HTTPConnection
        if self.context is None:
            self._connection = http.client.HTTPConnection("127.0.0.1", self.port, TIMEOUT_S)
        else:
            self._connection = http.client.HTTPSConnection(
                "localhost", self.port, timeout=TIMEOUT_S, context=self.context
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        """Return the response to GET; ``_`` in names of headers means ``-``."""
        return self.ask("GET", path, None, **headers)

    def post(self, path: str, body: Any = b"", **headers: str) -> Reply:
        """Return the response to POST; a body that is not bytes is sent as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", path, data, **headers)

    def ask(self, method: str, path: str, body: bytes | None, **headers: str) -> Reply:
        """Return the response to a request."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        self._connection.request(method, path, body, {**self.headers, **given})
        answer = self._connection.getresponse()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return Reply(answer.status, found, answer.read())


@contextmanager
def streamed(port: int, path: str, body: Any, **headers: str) -> Iterator[http.client.HTTPResponse]:
    """Yield a response of lines that has begun; its connection is closed afterwards."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        given = {"Accept": "application/x-ndjson", **headers}
        connection.request("POST", path, json.dumps(body), given)
        yield connection.getresponse()
    finally:
        connection.close()
