"""Live page: its files, and the status that it shows."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Iterator
from importlib.resources import files
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Send

from els_service.server.web.context import metadata_of
from els_service.server.web.errors import JSON
from els_service.server.web.responses import Endpoint
from els_service.server.web.status_report import StatusReport
from els_service.version import VERSION

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}

Check = Callable[[Any], Awaitable[None]]
"""Raises if the caller with these headers has no token."""


class PageRoutes:
    """Routes of the page and of ``/v1/status``.

    Args:
        mode: off, read or draw, as the setting ``http_page``.
        status: of the server.
        check: of callers of the status; the page itself has nothing to protect.
    """

    def __init__(self, mode: str, status: StatusReport, check: Check) -> None:
        self._mode, self._status, self._check = mode, status, check

    def routes(self) -> Iterator[Route]:
        """Yield the routes."""
        yield Route("/v1/status", Endpoint(self._report), methods=("GET",))
        if self._mode == "off":
            return
        for file in files("els_service.server.web").joinpath("page").iterdir():
            kind = _TYPES.get(file.name.rpartition(".")[2])
            if kind is not None:
                path = "/" if file.name == "index.html" else f"/page/{file.name}"
                yield Route(path, Endpoint(_file(file.read_bytes(), kind)), methods=("GET",))

    async def _report(self, request: Request, _: Send) -> Response:
        await self._check(metadata_of(request.scope))
        report = {"version": VERSION, "page": self._mode, **await self._status.current()}
        return Response(orjson.dumps(report), 200, {"cache-control": "no-store"}, JSON)


def _file(content: bytes, kind: str) -> Any:
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**_HEADERS, "etag": tag}

    async def answer(request: Request, _: Send) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(None, 304, headers)
        return Response(content, 200, headers, kind)

    return answer
