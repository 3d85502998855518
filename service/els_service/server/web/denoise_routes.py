"""Routes of ``denoise.v1`` for people with curl, and for the live page: JSON and PNG."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Send

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.config import Limits
from els_service.engine.registry import ModelRegistry
from els_service.errors import InvalidArgumentError
from els_service.server.requests.tensors import decode_level
from els_service.server.transport.handlers import SharedHandlers
from els_service.server.web import pictures
from els_service.server.web.bodies import BodyReader, as_object, as_text, kind_of, parsed
from els_service.server.web.calls import call
from els_service.server.web.context import HttpContext
from els_service.server.web.errors import JSON, CallError
from els_service.server.web.messages import fill, plain
from els_service.server.web.responses import Endpoint

_SERVICE = pb.DESCRIPTOR.services_by_name["DenoiserService"]
_LINES, _PNG = "application/x-ndjson", "image/png"
_LARGE_BYTES = 64 << 10
_STEPS = 20
"""Steps of a sample that names none."""
_STRENGTH = 0.6
"""Default ``start_time`` of a remix."""
_MAX_SEED = 2**64


@dataclass(frozen=True)
class _Method:
    """Route of an RPC.

    Args:
        rpc: name of its method.
        picture: field of the request that a picture in the body stands for.
        shown: fields of the response that are shown as a picture; the first that is set.
    """

    rpc: str
    picture: str = "x"
    shown: tuple[str, ...] = ("denoised",)


METHODS = {
    "denoise": _Method("Denoise"),
    "score": _Method("Score", shown=("score",)),
    "sample": _Method("Sample", "start", ("decoded", "x")),
    "remix": _Method("Sample", "start", ("decoded", "x")),
    "explain": _Method("Explain"),
    "originality": _Method("Originality", shown=()),
    "vjp": _Method("Vjp", shown=("vjp",)),
    "jvp": _Method("Jvp", shown=("jvp",)),
}
"""Name after the colon → RPC."""
_SCALED = ("score", "vjp", "jvp")
"""Fields whose pictures are scaled to their largest magnitude."""
_EACH = ("explain", "originality")
"""Methods whose responses are always lines, one for each image."""


@dataclass
class _Options:
    """Fields of a body that are not of the request's message."""

    encoding: str = "base64"
    resize: bool = False
    noise_seed: int | None = None
    strength: float | None = None


@dataclass
class _Exchange:
    """One request and the form of its response."""

    name: str
    request: Request
    options: _Options = field(default_factory=_Options)

    @property
    def method(self) -> _Method:
        return METHODS[self.name]

    @property
    def has_picture(self) -> bool:
        """Whether the body is a picture."""
        return self.request.headers.get("content-type", "").lower().startswith("image/")

    @property
    def wants_lines(self) -> bool:
        """Whether each message of a stream is sent as a line."""
        return self.name in _EACH or _LINES in self.request.headers.get("accept", "")

    @property
    def wants_png(self) -> bool:
        """Whether the response is a picture: asked for, or not excluded by the sender of one."""
        accept = self.request.headers.get("accept", "")
        return _PNG in accept or (self.has_picture and accept in ("", "*/*"))


class DenoiseRoutes:
    """Routes below ``/v1``.

    Args:
        handlers: of the service.
        bodies: reads the bodies.
        models: served models, for the sizes of their pictures.
    """

    def __init__(self, handlers: SharedHandlers, bodies: BodyReader, models: ModelRegistry) -> None:
        self._handlers, self._bodies, self._models = handlers, bodies, models
        self._limits: Limits = bodies.limits

    def routes(self) -> Iterator[Route]:
        """Yield the routes."""
        yield Route("/v1/models", Endpoint(self._list), methods=("GET",))
        for version in ("", "/versions/{version}"):
            for name in METHODS:
                answer = Endpoint(self._answer(name))
                yield Route(f"/v1/models/{{model}}{version}:{name}", answer, methods=("POST",))
            yield Route(f"/v1/models/{{model}}{version}", Endpoint(self._get), methods=("GET",))

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
        streamed = _SERVICE.methods_by_name[METHODS[name].rpc].server_streaming

        async def answer(request: Request, send: Send) -> Response | None:
            exchange = _Exchange(name, request)
            if not streamed:
                return await self._unary(exchange)
            if exchange.wants_lines:
                await self._lines(exchange, send)
                return None
            return await self._last(exchange)

        return answer

    async def _unary(self, exchange: _Exchange) -> Response:
        context = self._context(exchange)
        found = await call(self._handlers, _path(exchange.method.rpc), context)
        return await self._response(exchange, found)

    async def _last(self, exchange: _Exchange) -> Response:
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

    async def _lines(self, exchange: _Exchange, send: Send) -> None:
        """Send each message of a stream as a line of JSON; an error after the first is a line."""
        started = False

        async def write(message: Any) -> None:
            nonlocal started
            line = await _aside(message, lambda: _dumped(_described(exchange, message)))
            if not started:
                started = True
                await send(_LINES_START)
            await send({"type": "http.response.body", "body": line + b"\n", "more_body": True})

        try:
            await call(self._handlers, _path(exchange.method.rpc), self._context(exchange, write))
        except CallError as failure:
            if not started:
                raise
            line = orjson.dumps(failure.body())
            await send({"type": "http.response.body", "body": line + b"\n", "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _response(self, exchange: _Exchange, found: Any) -> Response:
        found = _message(exchange.method.rpc, found)
        if not exchange.wants_png:
            described = await _aside(found, lambda: _dumped(_described(exchange, found)))
            return Response(described, media_type=JSON)
        shown = next(name for name in exchange.method.shown if found.HasField(name))
        tensor, scaled = getattr(found, shown), shown in _SCALED
        sheet = await _aside(found, lambda: pictures.sheet_of(tensor, scaled=scaled))
        if sheet is None:
            got = f"{_PNG} of images [C, H, W] = {list(tensor.shape[1:])}"
            raise InvalidArgumentError("Accept", "application/json for this model", got)
        return Response(sheet, media_type=_PNG)

    def _context(self, exchange: _Exchange, write: Any = None) -> HttpContext:
        async def read(context: HttpContext) -> bytes:
            return await self._bodies.converted(
                context, lambda data: self._converted(exchange, data)
            )

        request = exchange.request
        return HttpContext(request.scope, request.receive, read, write)

    def _converted(self, exchange: _Exchange, data: bytes) -> bytes:
        """Return the serialised message of a body."""
        fields = _query(exchange.request)
        if exchange.has_picture:
            fields[exchange.method.picture] = data
        elif data:
            fields |= as_object(parsed(data), "body")
        if "image" in fields:
            fields[exchange.method.picture] = fields.pop("image")
        exchange.options = _options(fields)
        message: Any = _kind(exchange.method.rpc, "input_type")()
        message.model = exchange.request.path_params["model"]
        message.version = exchange.request.path_params.get("version", "")
        for name in ("model", "version"):
            given = as_text(fields.pop(name, None), name)
            if given and given != (message.model if name == "model" else message.version):
                raise InvalidArgumentError(name, "that of the path, or none", repr(given[:100]))
        if exchange.method.rpc == "Sample":
            self._set_defaults(exchange, fields)

        pictured: list[str] = []

        def picture(name: str, value: Any) -> pb.Tensor:
            pictured.append(name)
            return self._picture(exchange, message, name, value)

        fill(message, fields, picture)
        if exchange.options.resize and not pictured:
            raise InvalidArgumentError("resize", "a picture beside it", "none")
        if exchange.options.noise_seed is not None and not _takes_noise(message, pictured):
            raise InvalidArgumentError("noise_seed", "a picture as x and a level beside it", "none")
        content: bytes = message.SerializeToString()
        return content

    def _set_defaults(self, exchange: _Exchange, fields: dict[str, Any]) -> None:
        params = exchange.request.path_params
        if exchange.name == "remix":
            info = self._models.find(params["model"], params.get("version", "")).info
            if info.scales:
                fields.setdefault("sampler", "pyramid")
                fields.setdefault("steps", 0)
            if "start" in fields and "start_time" not in fields and "times" not in fields:
                fields["start_time"] = exchange.options.strength or _STRENGTH
        elif exchange.options.strength is not None:
            raise InvalidArgumentError("strength", "none but for remix", exchange.options.strength)
        if "steps" not in fields and "times" not in fields:
            fields["steps"] = _STEPS

    def _picture(self, exchange: _Exchange, message: Any, name: str, value: Any) -> pb.Tensor:
        info = self._models.find(message.model, message.version).info
        limits, resize = self._limits, exchange.options.resize
        if name == "mask":
            return pictures.mask_of(name, value, limits)
        channels, height, width = info.shape
        if exchange.method.rpc == "Sample":
            height, width = message.height or height, message.width or width
        tensor = pictures.tensor_of(name, value, (channels, height, width), limits, resize=resize)
        seed = exchange.options.noise_seed
        if seed is None or not _takes_noise(message, [name]):
            return tensor
        return pictures.with_noise(tensor, decode_level(message.level, info.levels, limits), seed)


_LINES_START: Any = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", _LINES.encode()),
        (b"cache-control", b"no-store"),
        # A proxy that buffers would hold the lines back.
        (b"x-accel-buffering", b"no"),
    ],
}


def _takes_noise(message: Any, pictured: Sequence[str]) -> bool:
    """Return whether ``noise_seed`` makes a noisy image of a picture among these fields."""
    return "x" in pictured and hasattr(message, "level")


def _path(rpc: str) -> str:
    return f"/{_SERVICE.full_name}/{rpc}"


def _kind(rpc: str, which: str) -> type[Message]:
    return GetMessageClass(getattr(_SERVICE.methods_by_name[rpc], which))


def _message(rpc: str, found: Any) -> Any:
    """Return the message of a response, which a servicer may return serialised."""
    return _kind(rpc, "output_type").FromString(found) if isinstance(found, bytes) else found


def _query(request: Request) -> dict[str, Any]:
    """Return the fields of a query string; values that are JSON are read as JSON."""
    fields: dict[str, Any] = {}
    for name, text in request.query_params.multi_items():
        try:
            value = orjson.loads(text)
        except orjson.JSONDecodeError:
            value = text
        if name in fields:
            before = fields[name]
            fields[name] = [*(before if isinstance(before, list) else [before]), value]
        else:
            fields[name] = value
    return fields


def _options(fields: dict[str, Any]) -> _Options:
    """Take the options out of the fields of a body.

    Raises:
        InvalidArgumentError: One has a wrong value.
    """
    options = _Options()
    if "encoding" in fields:
        options.encoding = as_text(fields.pop("encoding"), "encoding")
        if options.encoding not in ("base64", "png"):
            raise InvalidArgumentError("encoding", "base64 or png", repr(options.encoding)[:100])
    if "resize" in fields:
        value = fields.pop("resize")
        if not isinstance(value, bool):
            raise InvalidArgumentError("resize", "true or false", kind_of(value))
        options.resize = value
    if "noise_seed" in fields:
        value = fields.pop("noise_seed")
        if type(value) is not int or not 0 <= value < _MAX_SEED:
            raise InvalidArgumentError("noise_seed", "an integer of 64 bits from 0", kind_of(value))
        options.noise_seed = value
    if "strength" in fields:
        value = fields.pop("strength")
        if type(value) not in (int, float) or not 0 < value <= 1:
            raise InvalidArgumentError("strength", "0 < strength <= 1", kind_of(value))
        options.strength = value
    return options


def _described(exchange: _Exchange, found: Any) -> dict[str, Any]:
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
