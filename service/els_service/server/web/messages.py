"""Messages of protobuf as JSON with plain numbers, and requests of ``denoise.v1`` from JSON.

Requests have the JSON form of their messages, and shorter forms for people: ``sigma`` in place of
``level``, one value in place of a list, pictures in place of tensors.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor as Kinds
from google.protobuf.message import Message

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.errors import InvalidArgumentError, shortened
from els_service.server.web.bodies import kind_of

_LEVELS = ("sigma", "alpha_bar", "time")
_SHORT = {"label": "labels", "window": "windows"}
"""Short name of a field → its name."""
_ENUMS = {"sampler": "SAMPLER_", "timesteps": "TIMESTEPS_", "output_dtype": "DTYPE_"}
"""Field of an enumeration → prefix of its values, which may be omitted."""
_FAULT = re.compile(
    r"(?:Failed to parse \S+ field: )*(.*?)(?: at \w+\.([\w.]*\w)\S*)?\.?", re.DOTALL
)
"""Text of a parser: reason, and path of the field below the message's type."""
_TENSOR = pb.Tensor.DESCRIPTOR
_URL_SAFE = str.maketrans("-_", "+/")
FieldDescriptor = Any
"""A ``FieldDescriptor`` of the implementation in use, which its stubs do not unite."""

Picture = Callable[[str, Any], pb.Tensor]
"""Returns the tensor of a field's picture."""


def plain(message: Message, tensor: Callable[[pb.Tensor], Any] | None = None) -> dict[str, Any]:
    """Return a message as a JSON object with all of its fields; ``bytes`` are base64.

    Args:
        message: any.
        tensor: returns the JSON of a tensor in place of its message.
    """
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            of = field.message_type.fields_by_name["value"]
            found[field.name] = {str(key): _value(of, each, tensor) for key, each in value.items()}
        elif field.is_repeated:
            found[field.name] = [_value(field, each, tensor) for each in value]
        elif not field.has_presence or message.HasField(field.name):
            found[field.name] = _value(field, value, tensor)
    return found


def _value(field: FieldDescriptor, value: Any, tensor: Callable[[pb.Tensor], Any] | None) -> Any:
    if field.message_type is not None:
        if tensor is not None and field.message_type is _TENSOR:
            return tensor(value)
        return plain(value, tensor)
    if field.enum_type is not None:
        named = field.enum_type.values_by_number.get(value)
        return value if named is None else named.name
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def fill(message: Message, fields: dict[str, Any], picture: Picture) -> None:
    """Set the fields of a request.

    Args:
        message: request of ``denoise.v1``.
        fields: JSON values by name.
        picture: decodes pictures, which stand for tensors as a string or as ``{"png": …}``.

    Raises:
        InvalidArgumentError: A field is unknown, or its value has the wrong type.
    """
    known = message.DESCRIPTOR.fields_by_name
    given: dict[str, Any] = {}
    pictures: dict[str, Any] = {}
    for name, value in fields.items():
        if name in _LEVELS and "level" in known:
            if "level" in fields:
                raise InvalidArgumentError("level", f"none beside {name}", kind_of(value))
            given["level"] = {**given.get("level", {}), name: _list(value)}
            continue
        name = _SHORT.get(name, name)
        if name not in known:
            raise InvalidArgumentError(shortened(name, 100), f"one of {_names(message)}", "it")
        field = known[name]
        if field.message_type is _TENSOR and _is_picture(value):
            pictures[name] = value
        else:
            given[name] = _expanded(field, value)
    for name, value in given.items():
        _parse(message, name, value)
    for name, value in pictures.items():
        getattr(message, name).CopyFrom(picture(name, value))


def _expanded(field: FieldDescriptor, value: Any) -> Any:
    """Return a value with a list around one, and with the full name of an enumeration's."""
    if field.enum_type is not None and isinstance(value, str):
        full = _ENUMS.get(field.name, "") + value.upper()
        return full if full in field.enum_type.values_by_name else value
    return _list(value) if field.is_repeated else value


def _list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _is_picture(value: Any) -> bool:
    return isinstance(value, str | bytes | list) or (isinstance(value, dict) and "png" in value)


def _names(message: Message) -> str:
    return ", ".join(field.name for field in message.DESCRIPTOR.fields)


def _parse(message: Message, name: str, value: Any) -> None:
    """Set one field from its JSON value."""
    field = message.DESCRIPTOR.fields_by_name[name]
    if field.message_type is _TENSOR and isinstance(value, dict):
        _check_base64(f"{name}.data", value.get("data"))
    elif field.type == Kinds.TYPE_BYTES:
        _check_base64(name, value)
    try:
        json_format.ParseDict({name: value}, message)
    except json_format.ParseError as error:
        found = _FAULT.fullmatch(str(error))
        reason, path = found.groups() if found else (str(error), None)
        kind = message.DESCRIPTOR.fields_by_name[name]
        raise InvalidArgumentError(path or name, f"{_kind(kind)} in JSON", reason) from None
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        kind = message.DESCRIPTOR.fields_by_name[name]
        raise InvalidArgumentError(name, f"{_kind(kind)} in JSON", kind_of(value)) from None


def _check_base64(field: str, value: Any) -> None:
    """Check bytes in JSON, of which protobuf's parser drops the characters that are no base64."""
    if not isinstance(value, str):
        return
    try:
        base64.b64decode(value.translate(_URL_SAFE) + "=" * (-len(value) % 4), validate=True)
    except ValueError as error:
        raise InvalidArgumentError(field, "base64", error) from None


def _kind(field: FieldDescriptor) -> str:
    """Return the name of a field's type, for errors."""
    if field.message_type is not None:
        kind = f"a {field.message_type.name}"
    elif field.enum_type is not None:
        kind = f"one of {', '.join(value.name for value in field.enum_type.values)}"
    else:
        kind = {
            Kinds.CPPTYPE_BOOL: "true or false",
            Kinds.CPPTYPE_STRING: "a string",
            Kinds.CPPTYPE_DOUBLE: "a number",
            Kinds.CPPTYPE_FLOAT: "a number",
        }.get(field.cpp_type, "an integer")
    return f"an array of {kind}" if field.is_repeated else kind
