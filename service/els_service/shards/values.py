"""Tensors, levels and geometries in messages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from els_kernels.blocked_moments import Level
from els_kernels.geometry import Geometry
from els_service.shards.messages import Array, Message


def reply(*tensors: Tensor, **fields: Any) -> Message:
    """Return an answer of tensors and values."""
    return Message("answer", fields, [array_of(tensor) for tensor in tensors])


def array_of(tensor: Tensor) -> Array:
    """Return a tensor as an array."""
    array: Array = tensor.contiguous().numpy()
    return array


def tensors_of(message: Message) -> list[Tensor]:
    """Return the arrays of a message as tensors that share their memory."""
    return [torch.from_numpy(array) for array in message.arrays]


def level_fields(level: Level) -> dict[str, Any]:
    """Return the fields of a query in a message, beside its pixels."""
    return {"a": level.a, "s": level.s, "window": level.window} | geometry_fields(level.geometry)


def level_of(message: Message) -> Level:
    """Return the query in a message; its pixels are the first array."""
    fields = message.fields
    x = torch.from_numpy(message.arrays[0])
    return Level(x, fields["a"], fields["s"], fields["window"], geometry_of(fields))


def geometry_fields(geometry: Geometry) -> dict[str, Any]:
    """Return the fields of a geometry in a message."""
    return {"geometry": [geometry.sources, geometry.padding, geometry.whole]}


def geometry_of(fields: dict[str, Any]) -> Geometry:
    """Return the geometry in a message."""
    sources, padding, whole = fields["geometry"]
    return Geometry(sources, padding, whole)
