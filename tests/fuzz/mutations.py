"""Messages that are nearly right: any message type by its descriptor, then bytes by hand."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

Kind = FieldDescriptor

_SIGNED = {Kind.CPPTYPE_INT32: 31, Kind.CPPTYPE_ENUM: 31, Kind.CPPTYPE_INT64: 63}
_UNSIGNED = {Kind.CPPTYPE_UINT32: 32, Kind.CPPTYPE_UINT64: 64}
_NASTY = [
    *("", " ", "zeros", "gaussian", "wiener", "nobody", "x", "sigma", "label", "window", "score"),
    *("1", "2", "-1", "+1", "01", "1_0", "١", "1" * 5000, "FP32", "INT64", "BYTES", "log_level"),
    *("\x00", "\r\n", "\x1b[31m", "\u202e", "\ufeff", "../zeros", "%00", "é" * 9000, "😀" * 3000),
]
_LONGEST = 300
"""Elements that a mutation adds to a list; rarer ones add many more."""


def _integers(bits: int, least: int) -> st.SearchStrategy[int]:
    most = (1 << bits) - 1
    edges = [least, most, least // 2, most // 2, most - 1, 1 << (bits // 2)]
    return st.one_of(
        st.integers(max(least, -2), 8), st.sampled_from(edges), st.integers(least, most)
    )


def scalar(kind: int) -> st.SearchStrategy[Any]:
    """Return any value of a field's C++ type, the extreme ones often."""
    if kind in _SIGNED:
        return _integers(_SIGNED[kind], -(1 << _SIGNED[kind]))
    if kind in _UNSIGNED:
        return _integers(_UNSIGNED[kind], 0)
    if kind == Kind.CPPTYPE_FLOAT:
        return st.floats(width=32)
    if kind == Kind.CPPTYPE_DOUBLE:
        return st.one_of(st.floats(), st.sampled_from([1e-4, 1e6, 0.5, 1.0, 5e-324, 1e-9]))
    if kind == Kind.CPPTYPE_BOOL:
        return st.booleans()
    return st.one_of(st.sampled_from(_NASTY), st.text(max_size=40))


def _value(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.type == Kind.TYPE_BYTES:
        return st.one_of(st.binary(max_size=200), st.integers(0, 5000).map(bytes))
    return scalar(field.cpp_type)


def mutate(draw: st.DrawFn, message: Message) -> None:
    """Change one thing in a message, however deep it lies."""
    fields: list[Any] = list(message.DESCRIPTOR.fields)
    field = draw(st.sampled_from(fields))
    if draw(st.integers(0, 9)) == 0:
        message.ClearField(field.name)
    elif _is_map(field):
        _mutate_map(draw, getattr(message, field.name), field.message_type)
    elif field.is_repeated:
        _mutate_list(draw, getattr(message, field.name), field)
    elif field.message_type is not None:
        inner = getattr(message, field.name)
        inner.SetInParent()
        if inner.DESCRIPTOR.fields:
            mutate(draw, inner)
    else:
        setattr(message, field.name, draw(_value(field)))


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _mutate_map(draw: st.DrawFn, entries: Any, entry: Descriptor) -> None:
    key = draw(scalar(entry.fields_by_name["key"].cpp_type))
    mutate(draw, entries[key])
    for i in range(draw(st.sampled_from([0, 0, 0, _LONGEST]))):
        entries[f"{key}{i}"].CopyFrom(entries[key])


def _mutate_list(draw: st.DrawFn, values: Any, field: FieldDescriptor) -> None:
    if values and draw(st.booleans()):
        place = draw(st.integers(0, len(values) - 1))
        if field.message_type is not None:
            mutate(draw, values[place])
        else:
            values[place] = draw(_value(field))
        return
    if values and draw(st.booleans()):
        del values[draw(st.integers(0, len(values) - 1)) :]
        return
    times = draw(st.sampled_from([1, 1, 1, 2, _LONGEST, 20 * _LONGEST]))
    if field.message_type is not None:
        mutate(draw, values.add())
        values.extend([values[-1]] * (min(times, _LONGEST) - 1))
    else:
        values.extend([draw(_value(field))] * times)


def damage(draw: st.DrawFn, data: bytes) -> bytes:
    """Change bytes: flip, cut, insert, repeat."""
    place = draw(st.integers(0, len(data)))
    match draw(st.sampled_from(["flip", "cut", "insert", "repeat"])):
        case "flip" if place < len(data):
            return (
                data[:place] + bytes([data[place] ^ draw(st.integers(1, 255))]) + data[place + 1 :]
            )
        case "cut":
            return data[:place]
        case "insert":
            return data[:place] + draw(st.binary(min_size=1, max_size=16)) + data[place:]
    end = draw(st.integers(place, len(data)))
    return data[:end] + data[place:end] * draw(st.sampled_from([1, 2, 50])) + data[end:]


@st.composite
def near(draw: st.DrawFn, good: st.SearchStrategy[Message]) -> bytes:
    """Draw the bytes of a good message with up to three things changed, or with damaged bytes."""
    message = draw(good)
    for _ in range(draw(st.integers(0, 3)) if message.DESCRIPTOR.fields else 0):
        mutate(draw, message)
    data = message.SerializeToString()
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        data = damage(draw, data)
    return data
