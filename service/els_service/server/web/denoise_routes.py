"""Routes of ``denoise.v1`` for people with curl, and for the live page: JSON and PNG."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from typing import Any

import orjson
from google.protobuf.message import Message
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Send

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.engine.registry import ModelRegistry
from els_service.errors import InvalidArgumentError, NotFoundError, shortened
from els_service.server.transport.handlers import SharedHandlers
from els_service.server.web import pictures
from els_service.server.web.bodies import BodyReader
from els_service.server.web.calls import call
from els_service.server.web.context import HttpContext
from els_service.server.web.denoise_requests import (
    LINES,
    METHODS,
    PNG,
    SERVICE,
    Exchange,
    RequestConverter,
    message_class,
)
from els_service.server.web.errors import JSON, CallError, method_not_allowed
from els_service.server.web.messages import plain
from els_service.server.web.responses import Endpoint, send_parts, sized_response

_LARGE_BYTES = 64 << 10
_SCALED = ("score", "vjp", "jvp")
"""Fields whose pictures are scaled to their largest magnitude."""


class DenoiseRoutes:
    """Routes below ``/v1``.

    Args:
        handlers: of the service.
        bodies: reads the bodies.
        models: served models, for the sizes of their pictures.
    """

    def __init__(self, handlers: SharedHandlers, bodies: BodyReader, models: ModelRegistry) -> None:
        self._handlers, self._bodies = handlers, bodies
        self._requests = RequestConverter(models, bodies.limits)

    def routes(self) -> Iterator[Route]:
        """Yield the routes."""
        yield Route("/v1/models", Endpoint(self._list), methods=("GET",))
        for version in ("", "/versions/{version}"):
            path = f"/v1/models/{{model}}{version}"
            for name in METHODS:
                answer = Endpoint(self._answer(name))
                yield Route(f"{path}:{name}", answer, methods=("POST",))
            yield Route(f"{path}:{{method}}", Endpoint(_other_method))
            yield Route(path, Endpoint(self._get), methods=("GET",))

    async def _list(self, request: Request, _: Send) -> Response:
        return _json(plain(await self._simple(request, "ListModels", pb.ListModelsRequest())))

    async def _get(self, request: Request, _: Send) -> Response:
        params = request.path_params
        named = pb.GetModelRequest(name=params["model"], version=params.get("version", ""))
        found: pb.GetModelResponse = await self._simple(request, "GetModel", named)
        return _json(plain(found.model))

    async def _simple(self, request: Request, rpc: str, message: Message) -> Any:
        async def read(context: HttpContext) -> bytes:
            return await self._bodies.converted(context, lambda _: message.SerializeToString())

        context = HttpContext(request.scope, request.receive, read)
        return await call(self._handlers, _path(rpc), context)

    def _answer(self, name: str) -> Any:
        streamed = SERVICE.methods_by_name[METHODS[name].rpc].server_streaming

        async def answer(request: Request, send: Send) -> Response | None:
            exchange = Exchange(name, request)
            if not streamed:
                return await self._unary(exchange)
            if exchange.wants_lines:
                await self._lines(exchange, send)
                return None
            return await self._last(exchange)

        return answer

    async def _unary(self, exchange: Exchange) -> Response:
        context = self._context(exchange)
        found = await call(self._handlers, _path(exchange.method.rpc), context)
        return await self._response(exchange, found)

    async def _last(self, exchange: Exchange) -> Response:
        """Return the last message of a stream; a failure has the resume token, if there is one."""
        last: Any = None

        async def keep(message: Any) -> None:
            nonlocal last
            last = message

        context = self._context(exchange, keep)
        try:
            await call(self._handlers, _path(exchange.method.rpc), context)
        except CallError as failure:
            if last is not None and last.resume_token:
                failure.more["resume_token"] = base64.b64encode(last.resume_token).decode()
            raise
        return await self._response(exchange, last)

    async def _lines(self, exchange: Exchange, send: Send) -> None:
        """Send each message of a stream as a line of JSON; an error after the first is a line."""
        started = False

        async def write(message: Any) -> None:
            nonlocal started
            line = await _aside(message, lambda: _dumped(_described(exchange, message)))
            if not started:
                started = True
                await send(_LINES_START)
            await send_parts(send, (line + b"\n",))

        try:
            await call(self._handlers, _path(exchange.method.rpc), self._context(exchange, write))
        except CallError as failure:
            if not started:
                raise
            await send_parts(send, (orjson.dumps(failure.body()) + b"\n",))
        await send({"type": "http.response.body", "body": b""})

    async def _response(self, exchange: Exchange, found: Any) -> Response:
        found = _message(exchange.method.rpc, found)
        if not exchange.wants_png:
            described = await _aside(found, lambda: _dumped(_described(exchange, found)))
            return sized_response(described, JSON)
        shown = next(name for name in exchange.method.shown if found.HasField(name))
        tensor, scaled = getattr(found, shown), shown in _SCALED
        sheet = await _aside(found, lambda: pictures.sheet_of(tensor, scaled=scaled))
        if sheet is None:
            got = f"{PNG} of images [C, H, W] = {list(tensor.shape[1:])}"
            raise InvalidArgumentError("Accept", "application/json for this model", got)
        return sized_response(sheet, PNG)

    def _context(self, exchange: Exchange, write: Any = None) -> HttpContext:
        async def read(context: HttpContext) -> bytes:
            bodies, requests = self._bodies, self._requests
            data = await bodies.received(context)
            size = len(data) + len(exchange.request.scope["query_string"])
            fields = await bodies.aside(context, size, lambda: requests.fields(exchange, data))
            # Known from the heads of pictures, which JSON may spell in many ways.
            size += requests.decoded_bytes(exchange, fields)
            return await bodies.aside(context, size, lambda: requests.message(exchange, fields))

        request, timeout = exchange.request, exchange.method.timeout_field
        return HttpContext(request.scope, request.receive, read, write, timeout)


_LINES_START: Any = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", LINES.encode()),
        (b"cache-control", b"no-store"),
        # A proxy that buffers would hold the lines back.
        (b"x-accel-buffering", b"no"),
    ],
}


async def _other_method(request: Request, _: Send) -> Response:
    """Respond to what no method's route matched: another method of HTTP, or of a model."""
    method = request.path_params["method"]
    if method in METHODS:
        return method_not_allowed("POST")
    names = ", ".join(METHODS)
    raise NotFoundError(f"method: expected one of {names}, got {shortened(method, 100)!r}")


def _path(rpc: str) -> str:
    return f"/{SERVICE.full_name}/{rpc}"


def _message(rpc: str, found: Any) -> Any:
    """Return the message of a response, which a servicer may return serialised."""
    if not isinstance(found, bytes):
        return found
    return message_class(rpc, response=True).FromString(found)


def _described(exchange: Exchange, found: Any) -> dict[str, Any]:
    """Return the JSON of a response, whose tensors have data in base64, or pictures."""
    found = _message(exchange.method.rpc, found)
    if exchange.options.encoding != "png":
        return plain(found)
    described = plain(found, _tensor_png)
    for name in _SCALED:
        if name in described:
            described[name] = _tensor_png(getattr(found, name), scaled=True)
    return described


def _tensor_png(tensor: pb.Tensor, *, scaled: bool = False) -> dict[str, Any]:
    """Return the JSON of a tensor as PNG files; one that has no such form as it is."""
    files = pictures.png_of(tensor, scaled=scaled)
    if not files:
        return plain(tensor)
    encoded = [base64.b64encode(file).decode() for file in files]
    return {"shape": list(tensor.shape), "png": encoded}


async def _aside(found: Any, work: Any) -> Any:
    """Return the result of a function of a response, off the event loop if it is large."""
    size = len(found) if isinstance(found, bytes) else found.ByteSize()
    return work() if size <= _LARGE_BYTES else await asyncio.to_thread(work)


def _dumped(content: dict[str, Any]) -> bytes:
    return orjson.dumps(content)


def _json(content: Any) -> Response:
    return Response(orjson.dumps(content), media_type=JSON)
