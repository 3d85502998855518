"""Requests of ``denoise.v1`` from the query and the body of HTTP: fields, options and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from starlette.requests import Request

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.config import Limits
from els_service.engine.registry import ModelRegistry
from els_service.errors import InvalidArgumentError
from els_service.server.requests.tensors import decode_level
from els_service.server.web import pictures
from els_service.server.web.bodies import parsed
from els_service.server.web.json_values import as_object, as_text, kind_of
from els_service.server.web.messages import fill

SERVICE = pb.DESCRIPTOR.services_by_name["DenoiserService"]
LINES, PNG = "application/x-ndjson", "image/png"
_STEPS = 20
"""Steps of a sample that names none."""
_STRENGTH = 0.6
"""Default ``start_time`` of a remix."""
_MAX_SEED = 2**64
_DIGITS = 20
"""Digits of the largest seed."""


@dataclass(frozen=True)
class Method:
    """Route of an RPC.

    Args:
        rpc: name of its method.
        picture: field of the request that a picture in the body stands for.
        shown: fields of the response that are shown as a picture; the first that is set.
    """

    rpc: str
    picture: str = "x"
    shown: tuple[str, ...] = ("denoised",)

    @property
    def timeout_field(self) -> str:
        """Name of the request's field that limits its time; empty if it has none."""
        name = "timeout_s"
        return name if name in message_class(self.rpc).DESCRIPTOR.fields_by_name else ""


METHODS = {
    "denoise": Method("Denoise"),
    "score": Method("Score", shown=("score",)),
    "sample": Method("Sample", "start", ("decoded", "x")),
    "remix": Method("Sample", "start", ("decoded", "x")),
    "explain": Method("Explain"),
    "originality": Method("Originality", shown=()),
    "vjp": Method("Vjp", shown=("vjp",)),
    "jvp": Method("Jvp", shown=("jvp",)),
}
"""Name after the colon → RPC."""
_EACH = ("explain", "originality")
"""Methods whose responses are always lines, one for each image."""


@dataclass
class Options:
    """Fields of a body that are not of the request's message."""

    encoding: str = "base64"
    resize: bool = False
    noise_seed: int | None = None
    strength: float | None = None


@dataclass
class Exchange:
    """One request and the form of its response."""

    name: str
    request: Request
    options: Options = field(default_factory=Options)

    @property
    def method(self) -> Method:
        """Route of the request."""
        return METHODS[self.name]

    @property
    def has_picture(self) -> bool:
        """Whether the body is a picture."""
        return self.request.headers.get("content-type", "").lower().startswith("image/")

    @property
    def wants_lines(self) -> bool:
        """Whether each message of a stream is sent as a line."""
        return self.name in _EACH or LINES in self.request.headers.get("accept", "")

    @property
    def wants_png(self) -> bool:
        """Whether the response is a picture: asked for, or not excluded by the sender of one."""
        accept = self.request.headers.get("accept", "")
        return PNG in accept or (self.has_picture and accept in ("", "*/*"))


@dataclass(frozen=True)
class RequestConverter:
    """Converter of queries and bodies to messages.

    Args:
        models: served models, for the sizes of their pictures.
        limits: of requests.
    """

    models: ModelRegistry
    limits: Limits

    def fields(self, exchange: Exchange, data: bytes) -> dict[str, Any]:
        """Return the fields of query and body, and set the options of the exchange.

        Returns:
            JSON values by name, with ``image`` under the name that it stands for.

        Raises:
            InvalidArgumentError: The body is no JSON object, or an option has a wrong value.
            ResourceExhaustedError: The body has too many values.
        """
        fields = _query(exchange.request)
        picture = exchange.method.picture
        if exchange.has_picture:
            if fields.keys() & {"image", picture}:
                raise InvalidArgumentError(picture, "none beside a picture as the body", "one")
            fields[picture] = data
        elif data:
            fields |= as_object(parsed(data), "body")
        image = fields.pop("image", None)
        if image is not None:
            if fields.get(picture) is not None:
                raise InvalidArgumentError("image", f"none beside {picture}", kind_of(image))
            fields[picture] = image
        exchange.options = _options(fields)
        return fields

    def decoded_bytes(self, exchange: Exchange, fields: dict[str, Any]) -> int:
        """Return about how many bytes ``message`` takes for the pictures among fields."""
        noisy = exchange.options.noise_seed is not None
        return pictures.decoded_bytes(fields, self.limits, noisy=noisy)

    def message(self, exchange: Exchange, fields: dict[str, Any]) -> bytes:
        """Return the serialised message of the fields of an exchange.

        Raises:
            InvalidArgumentError: A field is wrong.
            NotFoundError: There is no such model.
            ResourceExhaustedError: A picture exceeds a limit.
        """
        options = exchange.options
        if options.strength is not None and exchange.name != "remix":
            raise InvalidArgumentError("strength", "none but for remix", kind_of(options.strength))
        message: Any = message_class(exchange.method.rpc)()
        message.model = exchange.request.path_params["model"]
        message.version = exchange.request.path_params.get("version", "")
        for name in ("model", "version"):
            given = as_text(fields.pop(name, None), name)
            if given and given != (message.model if name == "model" else message.version):
                raise InvalidArgumentError(name, "that of the path, or none", kind_of(given))
        if exchange.method.rpc == "Sample":
            self._set_defaults(exchange, fields)

        pictured: list[str] = []

        def picture(name: str, value: Any) -> pb.Tensor:
            pictured.append(name)
            return self._picture(exchange, message, name, value)

        fill(message, fields, picture)
        if options.resize and not pictured:
            raise InvalidArgumentError("resize", "a picture beside it", "none")
        if options.noise_seed is not None and not _takes_noise(message, pictured):
            raise InvalidArgumentError("noise_seed", "a picture as x and a level beside it", "none")
        content: bytes = message.SerializeToString()
        return content

    def _set_defaults(self, exchange: Exchange, fields: dict[str, Any]) -> None:
        """Set the fields that a sample or remix has by default."""
        strength = exchange.options.strength
        given = {name for name, value in fields.items() if value is not None}
        steps = _STEPS
        if exchange.name == "remix":
            params = exchange.request.path_params
            info = self.models.find(params["model"], params.get("version", "")).info
            if not given & {"start", "resume_token"}:
                raise InvalidArgumentError("image", "a picture to remix", "none")
            if info.scales:
                steps = 0  # at each scale the model's own number
                if "sampler" not in given:
                    fields["sampler"] = "pyramid"
            times = given & {"start_time", "times"}
            if strength is not None and times:
                expected = f"none beside {', '.join(sorted(times))}"
                raise InvalidArgumentError("strength", expected, kind_of(strength))
            if not times and "start" in given:
                fields["start_time"] = strength or _STRENGTH
        if not given & {"steps", "times"}:
            fields["steps"] = steps

    def _picture(self, exchange: Exchange, message: Any, name: str, value: Any) -> pb.Tensor:
        """Return the tensor of a picture, with noise if that is asked for."""
        info = self.models.find(message.model, message.version).info
        limits, resize = self.limits, exchange.options.resize
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


def message_class(rpc: str, *, response: bool = False) -> type[Message]:
    """Return the class of a method's request or response."""
    method = SERVICE.methods_by_name[rpc]
    return GetMessageClass(method.output_type if response else method.input_type)


def _takes_noise(message: Any, pictured: Sequence[str]) -> bool:
    """Return whether ``noise_seed`` makes a noisy image of a picture among these fields."""
    return "x" in pictured and hasattr(message, "level")


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


def _integer(value: Any) -> int | None:
    """Return an integer in JSON, or in the string that protobuf writes it in; None for others."""
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= _DIGITS:
        return int(value)
    return value if type(value) is int else None


def _options(fields: dict[str, Any]) -> Options:
    """Take the options out of the fields of a body; null stands for an absent one.

    Raises:
        InvalidArgumentError: One has a wrong value.
    """
    options = Options()
    if (value := fields.pop("encoding", None)) is not None:
        options.encoding = as_text(value, "encoding")
        if options.encoding not in ("base64", "png"):
            raise InvalidArgumentError("encoding", "base64 or png", kind_of(value))
    if (value := fields.pop("resize", None)) is not None:
        if not isinstance(value, bool):
            raise InvalidArgumentError("resize", "true or false", kind_of(value))
        options.resize = value
    if (value := fields.pop("noise_seed", None)) is not None:
        seed = _integer(value)
        if seed is None or not 0 <= seed < _MAX_SEED:
            raise InvalidArgumentError("noise_seed", "an integer of 64 bits from 0", kind_of(value))
        options.noise_seed = seed
    if (value := fields.pop("strength", None)) is not None:
        if type(value) not in (int, float) or not 0 < value <= 1:
            raise InvalidArgumentError("strength", "0 < strength <= 1", kind_of(value))
        options.strength = value
    return options
