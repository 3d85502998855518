"""Reader of ONNX files that rejects unsafe graphs.

Rejected are operators of custom domains, which need native libraries, external data outside the
file's folder, and weights with NaN. Everything else is validated by onnxruntime.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from els_service.errors import LoadError

_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
"""Operator domains built into onnxruntime."""


def read_onnx(path: Path) -> bytes | Path:
    """Return the argument for onnxruntime: the file's bytes, or its path if it has external data.

    Args:
        path: the file, with links resolved.

    Raises:
        LoadError: Not an ONNX file, or one with custom operators, data outside its folder, or NaN
            weights; names the operator or tensor.
    """
    import onnx

    try:
        content = path.read_bytes()
        model = onnx.load_model_from_string(content)
    except Exception as error:
        # The file system and protobuf raise different exceptions.
        raise LoadError(path, f"expected a readable ONNX file, got {error}") from error
    external = False
    functions = {(function.domain, function.name) for function in model.functions}
    for message in _messages(model):
        if isinstance(message, onnx.NodeProto):
            if (
                message.domain not in _DOMAINS
                and (message.domain, message.op_type) not in functions
            ):
                operator = f"{message.domain}.{message.op_type} in node {message.name}"
                raise LoadError(path, f"expected operators of ONNX or onnxruntime, got {operator}")
        elif isinstance(message, onnx.TensorProto):
            if message.data_location == onnx.TensorProto.EXTERNAL:
                external = True
                _check_location(message, path)
            _check_numbers(message, path)
        elif (
            isinstance(message, onnx.AttributeProto)
            and np.isnan([message.f, *message.floats]).any()
        ):
            # Of a Constant, for example, whose number is not in a tensor.
            raise LoadError(path, f"{message.name}: expected numbers, got NaN")
    return path if external else content


def _messages(message: Any) -> Iterator[Any]:
    """Yield a protobuf message and all messages nested in it: subgraphs, attributes."""
    waiting = [message]
    while waiting:
        current = waiting.pop()
        yield current
        for field, value in current.ListFields():
            if field.message_type is not None:
                waiting.extend(value if field.is_repeated else [value])


def _check_location(tensor: Any, path: Path) -> None:
    """Raise LoadError if a tensor's external data is outside the file's folder."""
    where = {entry.key: entry.value for entry in tensor.external_data}
    location = where.get("location", "")
    try:
        data = (path.parent / location).resolve()
        allowed = data.is_relative_to(path.parent) and data.is_file()
    except (OSError, RuntimeError, ValueError):
        allowed = False  # a loop of links, or no path at all
    if not allowed:
        expected = f"expected external data in {path.parent}"
        raise LoadError(path, f"{tensor.name}: {expected}, got {location!r:.120}")


def _check_numbers(tensor: Any, path: Path) -> None:
    from onnx import numpy_helper

    try:
        values = numpy_helper.to_array(tensor, base_dir=str(path.parent))
    except Exception as error:
        # Inconsistent sizes and unknown types raise different exceptions.
        text = " ".join(str(error).split())
        raise LoadError(path, f"{tensor.name}: expected a tensor, got {text:.200}") from error
    if values.dtype.kind == "V":
        # bfloat16 and the formats of 8 and 4 bits, which numpy does not know.
        values = values.astype(np.float32)
    if values.dtype.kind in "fc" and np.isnan(values).any():
        raise LoadError(path, f"{tensor.name}: expected numbers, got NaN")
