"""ASGI application of the HTTP port.

Beside tokens a browser needs two more checks, as it sends requests that a page of another site
makes: the origin of a request that computes or changes something has to be this server, and without
tokens a server at a loopback address, as well as any administrative request, has to be addressed as
loopback (otherwise a foreign name that resolves to 127.0.0.1 would reach it).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from els_service.errors import PermissionDeniedError
from els_service.server.addresses import is_loopback_name
from els_service.server.web.errors import failed, method_not_allowed, rejected

_SAFE = ("GET", "HEAD")
_ADMINISTRATION = ("/v2/repository/models/", "/v2/logging")


def application(routes: Iterable[Route], *, tokens: bool, loopback: bool) -> ASGIApp:
    """Return the application.

    Args:
        routes: in the order in which they are tried.
        tokens: whether callers need a token.
        loopback: whether the server is bound to a loopback address.
    """
    inner = Starlette(routes=list(routes), exception_handlers={HTTPException: _http_error})
    inner.router.redirect_slashes = False

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        receive, send = _closing(scope, receive, send)
        path = scope["path"]
        strict = not tokens and (loopback or path.startswith(_ADMINISTRATION))
        if reason := _why_foreign(scope, strict=strict):
            await failed(PermissionDeniedError(reason))(scope, receive, send)
            return
        await inner(scope, receive, send)

    return app


def _closing(scope: Scope, receive: Receive, send: Send) -> tuple[Receive, Send]:
    """Return both such that a response before the end of the body closes the connection.

    Otherwise the server would read and drop whatever the client still sends.
    """
    names = {name for name, _ in scope["headers"]}
    unread = not names.isdisjoint((b"content-length", b"transfer-encoding"))

    async def receiving() -> Message:
        nonlocal unread
        message = await receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            unread = False
        return message

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start" and unread:
            headers = [one for one in message.get("headers", ()) if one[0] != b"connection"]
            message = {**message, "headers": [*headers, (b"connection", b"close")]}
        await send(message)

    return receiving, sending


async def _http_error(_: Request, error: Exception) -> Response:
    """Return the response to a path or method that no route has."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        return method_not_allowed((error.headers or {}).get("Allow", "another method"))
    return rejected(error.status_code, "path: expected a route of docs/http.md, got another")


def _why_foreign(scope: Scope, *, strict: bool) -> str:
    """Return why a request may come from a page of another site; empty if it does not."""
    headers: dict[bytes, bytes] = dict(scope["headers"])
    host = headers.get(b"host", b"").decode("latin-1")
    if strict and not is_loopback_name(_name_of(host)):
        return f"Host: expected a loopback address, as there are no tokens, got {host[:100]!r}"
    origin = headers.get(b"origin")
    if origin is None or scope["method"] in _SAFE:
        return ""
    text = origin.decode("latin-1")
    if _authority(text) == host.lower():
        return ""
    return f"Origin: expected this server, got {text[:100]!r}"


def _name_of(host: str) -> str:
    """Return a Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _authority(origin: str) -> Any:
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None
