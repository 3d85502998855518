"""Checks of JSON values by the protobuf fields that they are for, with errors in JSON's words.

The parser of protobuf accepts more than its JSON form has, such as true as a number, and its errors
speak of Python.
"""

from __future__ import annotations

import base64
import math
from typing import Any

from google.protobuf.descriptor import FieldDescriptor as Kinds

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.errors import InvalidArgumentError, shortened
from els_service.server.web.json_values import as_list, as_object, as_text, kind_of

FieldDescriptor = Any
"""A ``FieldDescriptor`` of the implementation in use, which its stubs do not unite."""

_INTEGERS = {
    Kinds.CPPTYPE_INT32: (-(2**31), 2**31, "an integer of 32 bits"),
    Kinds.CPPTYPE_INT64: (-(2**63), 2**63, "an integer of 64 bits"),
    Kinds.CPPTYPE_UINT32: (0, 2**32, "an integer of 32 bits from 0"),
    Kinds.CPPTYPE_UINT64: (0, 2**64, "an integer of 64 bits from 0"),
}
"""Type → least value, first value beyond the largest, name."""
_FLOATS = (Kinds.CPPTYPE_FLOAT, Kinds.CPPTYPE_DOUBLE)
_TENSOR = pb.Tensor.DESCRIPTOR
_URL_SAFE = str.maketrans("-_", "+/")
_LONGEST_NAME = 100


def check_field(field: FieldDescriptor, value: Any, path: str) -> None:
    """Check the JSON value of a field.

    Args:
        field: of a message; no map.
        value: parsed JSON; null stands for an absent value.
        path: of the field, for errors.

    Raises:
        InvalidArgumentError: The value, or one within it, has the wrong type, or is out of range.
    """
    if value is None:
        return
    for one in as_list(value, path) if field.is_repeated else (value,):
        if field.message_type is not None:
            _check_message(field.message_type, one, path)
        else:
            _check_scalar(field, one, path)


def field_named(message_type: Any, name: str) -> FieldDescriptor | None:
    """Return the field of a name in protobuf's or in its JSON form; None if there is none."""
    found = message_type.fields_by_name.get(name)
    return found or next((one for one in message_type.fields if one.json_name == name), None)


def unknown_field(message_type: Any, path: str) -> InvalidArgumentError:
    """Return the error for a field that a message does not have."""
    names = ", ".join(field.name for field in message_type.fields)
    return InvalidArgumentError(path, f"one of {names}", "another field")


def _check_message(message_type: Any, value: Any, path: str) -> None:
    if message_type is _TENSOR and not isinstance(value, dict):
        expected = "an object with dtype, shape and data, or a PNG file in base64"
        raise InvalidArgumentError(path, expected, kind_of(value))
    if value is None:
        raise InvalidArgumentError(path, "an object", "null")
    for name, each in as_object(value, path).items():
        inner = f"{path}.{shortened(as_text(name, path), _LONGEST_NAME)}"
        field = field_named(message_type, name)
        if field is None:
            raise unknown_field(message_type, inner)
        check_field(field, each, inner)


def _check_scalar(field: FieldDescriptor, value: Any, path: str) -> None:
    """Check one number, string, truth value or name."""
    kind = field.cpp_type
    if kind in _FLOATS:
        _check_number(value, path)
    elif kind in _INTEGERS:
        _check_integer(value, path, *_INTEGERS[kind])
    elif kind == Kinds.CPPTYPE_BOOL:
        if not isinstance(value, bool):
            raise InvalidArgumentError(path, "true or false", kind_of(value))
    elif kind == Kinds.CPPTYPE_ENUM:
        values = field.enum_type.values_by_name
        # Numbers without a name are rejected by the servicer, as over gRPC.
        known = value in values if isinstance(value, str) else type(value) is int
        if not known or (type(value) is int and not -(2**31) <= value < 2**31):
            raise InvalidArgumentError(path, f"one of {', '.join(values)}", kind_of(value))
    elif value is None:
        raise InvalidArgumentError(path, "a string", "null")
    elif field.type == Kinds.TYPE_BYTES:
        _check_base64(as_text(value, path), path)
    else:
        as_text(value, path)


def _check_number(value: Any, path: str) -> None:
    number = value
    if isinstance(value, str):  # protobuf's form of what JSON has no number for
        try:
            number = float(value)
        except ValueError:
            number = None
    elif isinstance(value, float) and not math.isfinite(value):
        raise InvalidArgumentError(path, "a finite number", kind_of(value))
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise InvalidArgumentError(path, "a number", kind_of(value))


def _check_integer(value: Any, path: str, least: int, beyond: int, name: str) -> None:
    number = value
    if isinstance(value, str):  # protobuf's form of integers beyond 2^53
        try:
            number = int(value)
        except ValueError:
            number = None
    elif isinstance(value, float) and value.is_integer():
        number = int(value)
    if type(number) is not int or not least <= number < beyond:
        raise InvalidArgumentError(path, name, kind_of(value))


def _check_base64(value: str, path: str) -> None:
    """Check bytes in JSON, of which protobuf's parser drops the characters that are no base64."""
    try:
        base64.b64decode(value.translate(_URL_SAFE) + "=" * (-len(value) % 4), validate=True)
    except ValueError:
        raise InvalidArgumentError(path, "base64", "another string") from None
