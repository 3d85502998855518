"""Endpoints and responses of the HTTP port."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from els_service.errors import ElsError
from els_service.server.web.errors import CallError, failed, rejected

_PART_BYTES = 256 << 10

_log = logging.getLogger(__name__)

Answer = Callable[[Request, Send], Awaitable[Response | None]]
"""Returns the response to a request; None if it has sent one."""


class Endpoint:
    """ASGI application of one route: every exception becomes a response with a JSON body."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond to one request."""
        response: Response | None
        try:
            response = await self._answer(Request(scope, receive), send)
        except CallError as error:
            response = error.response()
        except ElsError as error:
            response = failed(error)
        except Exception:
            _log.exception("request over HTTP failed", extra={"path": scope["path"]})
            response = rejected(500, "internal error; the server's log has the cause")
        if response is not None:
            await response(scope, receive, send)


async def send_parts(send: Send, parts: Iterable[bytes]) -> None:
    """Send parts of a body, in smaller ones if they are large.

    Each waits until the client has read most of those before: a server that hands over a large body
    at once would hold it for a client that reads nothing, outside of all budgets.
    """
    for part in parts:
        view = memoryview(part)
        for at in range(0, len(view), _PART_BYTES):
            body = bytes(view[at : at + _PART_BYTES])
            await send({"type": "http.response.body", "body": body, "more_body": True})


def sized_response(body: bytes, media_type: str) -> Response:
    """Return a response that is sent in parts if it is large."""
    if len(body) <= _PART_BYTES:
        return Response(body, media_type=media_type)
    return PartsResponse((body,), {}, media_type)


class PartsResponse(Response):
    """Response whose body is sent in parts, without joining them."""

    def __init__(self, parts: Iterable[bytes], headers: dict[str, str], media_type: str) -> None:
        self._parts = list(parts)
        size = sum(map(len, self._parts))
        super().__init__(None, 200, {**headers, "content-length": str(size)}, media_type)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        start: Any = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        await send_parts(send, self._parts)
        await send({"type": "http.response.body", "body": b""})
