"""Routes of the Open Inference Protocol, with the extensions that gRPC has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import orjson
from google.protobuf.message import Message
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Send

from els_proto.inference import grpc_service_pb2 as pb
from els_service.errors import InvalidArgumentError
from els_service.server.transport.handlers import SharedHandlers
from els_service.server.web import inference
from els_service.server.web.bodies import BodyReader, header, parsed
from els_service.server.web.calls import call
from els_service.server.web.context import HttpContext
from els_service.server.web.errors import JSON
from els_service.server.web.json_values import as_object, kind_of
from els_service.server.web.messages import plain
from els_service.server.web.responses import Answer, Endpoint, PartsResponse, sized_response

_SERVICE = "/inference.GRPCInferenceService/"
_MODEL = "/v2/models/{model}"
_VERSIONS = ("", "/versions/{version}")
_BINARY_EXTENSION = "binary_tensor_data"
_UINT32 = 2**32

Fill = Callable[[Any, Any], None]
"""Sets the fields of a request from a JSON body."""


class InferenceRoutes:
    """Routes below ``/v2``.

    Args:
        handlers: of the service.
        bodies: reads the bodies.
        ready: whether the server is ready.
    """

    def __init__(
        self, handlers: SharedHandlers, bodies: BodyReader, ready: Callable[[], bool]
    ) -> None:
        self._handlers, self._bodies, self._ready = handlers, bodies, ready

    def routes(self) -> Iterator[Route]:
        """Yield the routes."""
        # First, as it is called most.
        for version in _VERSIONS:
            yield _route(f"{_MODEL}{version}/infer", self._infer, "POST")
        yield _route("/v2/health/live", self._live)
        yield _route("/v2/health/ready", self._is_ready)
        yield _route("/v2", self._server)
        yield _route("/v2/models/stats", self._rpc("ModelStatistics", pb.ModelStatisticsRequest))
        of_model = {
            "": self._rpc("ModelMetadata", pb.ModelMetadataRequest),
            "/ready": self._model_ready,
            "/config": self._rpc("ModelConfig", pb.ModelConfigRequest, unwrap="config"),
            "/stats": self._rpc("ModelStatistics", pb.ModelStatisticsRequest),
        }
        for version in _VERSIONS:
            for path, answer in of_model.items():
                yield _route(f"{_MODEL}{version}{path}", answer)
        index = self._rpc(
            "RepositoryIndex", pb.RepositoryIndexRequest, _fill_index, unwrap="models"
        )
        yield _route("/v2/repository/index", index, "POST")
        for name in ("load", "unload"):
            kind = getattr(pb, f"RepositoryModel{name.title()}Request")
            answer = self._rpc(f"RepositoryModel{name.title()}", kind, _fill_parameters)
            yield _route(f"/v2/repository/models/{{model}}/{name}", answer, "POST")
        settings = self._rpc("LogSettings", pb.LogSettingsRequest, _fill_log, unwrap="settings")
        yield _route("/v2/logging", settings, "GET", "POST")

    async def _infer(self, request: Request, _: Send) -> Response:
        model, version = request.path_params["model"], request.path_params.get("version", "")
        wanted = None

        async def read(context: HttpContext) -> bytes:
            nonlocal wanted
            length = header(context, inference.HEADER_LENGTH)
            convert = partial(inference.decoded, header_length=length, model=model, version=version)
            message, wanted = await self._bodies.converted(context, convert)
            return message

        timeout = "parameters.timeout"
        context = HttpContext(request.scope, request.receive, read, timeout_field=timeout)
        data = await call(self._handlers, f"{_SERVICE}ModelInfer", context)
        response = pb.ModelInferResponse.FromString(data)
        del data
        assert wanted is not None
        parts, head = inference.encoded(response, wanted)
        if head is None:
            return sized_response(parts[0], JSON)
        headers = {"inference-header-content-length": str(head)}
        if sum(map(len, parts)) <= 64 << 10:
            return Response(b"".join(parts), 200, headers, "application/octet-stream")
        return PartsResponse(parts, headers, "application/octet-stream")

    async def _live(self, *_: object) -> Response:
        return _json({"live": True})

    async def _is_ready(self, *_: object) -> Response:
        ready = self._ready()
        return _json({"ready": ready}, 200 if ready else 503)

    async def _server(self, request: Request, _: Send) -> Response:
        described = await self._call(request, "ServerMetadata", pb.ServerMetadataRequest, None)
        described["extensions"].append(_BINARY_EXTENSION)
        return _json(described)

    async def _model_ready(self, request: Request, _: Send) -> Response:
        found = await self._call(request, "ModelReady", pb.ModelReadyRequest, None)
        described = {"name": request.path_params["model"], **found}
        return _json(described, 200 if found["ready"] else 404)

    def _rpc(
        self, method: str, kind: type[Message], fill: Fill | None = None, *, unwrap: str = ""
    ) -> Answer:
        """Return the answer of a unary method.

        Args:
            method: name.
            kind: of its request.
            fill: sets its fields from the body.
            unwrap: field whose value is the whole response.
        """

        async def answer(request: Request, _: Send) -> Response:
            found = await self._call(request, method, kind, fill)
            return _json(_unwrapped(found, unwrap))

        return answer

    async def _call(
        self, request: Request, method: str, kind: type[Message], fill: Fill | None
    ) -> dict[str, Any]:
        message: Any = kind()
        named = {"model": ("name", "model_name"), "version": ("version",)}
        for parameter, value in request.path_params.items():
            name = next(each for each in named[parameter] if hasattr(message, each))
            setattr(message, name, value)

        def convert(data: bytes) -> bytes:
            if fill is not None and data:
                fill(message, parsed(data))
            content: bytes = message.SerializeToString()
            return content

        async def read(context: HttpContext) -> bytes:
            return await self._bodies.converted(context, convert)

        context = HttpContext(request.scope, request.receive, read)
        return plain(await call(self._handlers, _SERVICE + method, context))


def _route(path: str, answer: Answer, *methods: str) -> Route:
    return Route(path, Endpoint(answer), methods=methods or ("GET",))


def _json(content: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type=JSON)


def _unwrapped(found: dict[str, Any], name: str) -> Any:
    """Return the value of a field, whose entries that have one field each become their value."""
    if not name:
        return found
    value = found[name]
    if name == "settings":
        return {key: next(iter(each.values())) for key, each in value.items()}
    return value


def _fill_index(message: pb.RepositoryIndexRequest, body: Any) -> None:
    ready = as_object(body, "body").get("ready", False)
    if not isinstance(ready, bool):
        raise InvalidArgumentError("ready", "true or false", kind_of(ready))
    message.ready = ready


def _fill_parameters(message: Any, body: Any) -> None:
    for name in as_object(as_object(body, "body").get("parameters"), "parameters"):
        # Which names are allowed is decided by the servicer; their values have no effect.
        message.parameters[name].bool_param = True


def _fill_log(message: pb.LogSettingsRequest, body: Any) -> None:
    for name, value in as_object(body, "body").items():
        setting = message.settings[name]
        if isinstance(value, bool):
            setting.bool_param = value
        elif isinstance(value, int) and 0 <= value < _UINT32:
            setting.uint32_param = value
        elif isinstance(value, str):
            setting.string_param = value
        else:
            expected = "a truth value, an integer from 0 or a string"
            raise InvalidArgumentError(f"settings.{name[:100]}", expected, kind_of(value))
