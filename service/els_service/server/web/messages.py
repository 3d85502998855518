"""Messages of protobuf as JSON with plain numbers, and requests of ``denoise.v1`` from JSON.

Requests have the JSON form of their messages, and shorter forms for people: ``sigma`` in place of
``level``, one value in place of a list, pictures in place of tensors.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.errors import InvalidArgumentError, shortened
from els_service.server.web.json_fields import FieldDescriptor, check_field, unknown_field
from els_service.server.web.json_values import kind_of

_LEVELS = ("sigma", "alpha_bar", "time")
_SHORT = {"label": "labels", "window": "windows"}
"""Short name of a field → its name."""
_ENUMS = {"sampler": "SAMPLER_", "timesteps": "TIMESTEPS_", "output_dtype": "DTYPE_"}
"""Field of an enumeration → prefix of its values, which may be omitted."""
_TENSOR = pb.Tensor.DESCRIPTOR

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
        fields: JSON values by name; null stands for an absent value.
        picture: decodes pictures, which stand for tensors as a string or as ``{"png": …}``.

    Raises:
        InvalidArgumentError: A field is unknown, or its value has the wrong type.
    """
    known = message.DESCRIPTOR.fields_by_name
    given: dict[str, Any] = {}
    pictures: dict[str, Any] = {}
    for name, value in fields.items():
        if name in _LEVELS and "level" in known:
            if value is None:
                continue
            if fields.get("level") is not None:
                raise InvalidArgumentError("level", f"none beside {name}", kind_of(value))
            given["level"] = {**given.get("level", {}), name: _list(value)}
            continue
        name = _SHORT.get(name, name)
        if name not in known:
            raise unknown_field(message.DESCRIPTOR, shortened(name, 100))
        if value is None:
            continue
        if name in given or name in pictures:
            raise InvalidArgumentError(name, "one value", "several, by its names")
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


def _parse(message: Message, name: str, value: Any) -> None:
    """Set one field from its JSON value."""
    check_field(message.DESCRIPTOR.fields_by_name[name], value, name)
    try:
        json_format.ParseDict({name: value}, message)
    except (json_format.ParseError, AttributeError, LookupError, TypeError, ValueError):
        # What the check leaves to it, such as a number beyond its type's range.
        raise InvalidArgumentError(name, "protobuf's JSON form", kind_of(value)) from None
