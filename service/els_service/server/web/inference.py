"""``ModelInfer`` as JSON and binary tensors: the REST form of the Open Inference Protocol.

A body is a JSON document, or with the header ``Inference-Header-Content-Length`` a document of that
size followed by the contents of the tensors that have a parameter ``binary_data_size``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from els_proto.inference import grpc_service_pb2 as pb
from els_service.errors import InvalidArgumentError, ResourceExhaustedError
from els_service.server.requests.signatures import FP32, INPUTS, INT64, OUTPUTS
from els_service.server.web.bodies import MAX_VALUES, parsed
from els_service.server.web.json_values import as_list, as_object, as_text, kind_of

HEADER_LENGTH = "inference-header-content-length"
_BINARY, _BINARY_SIZE, _ALL_BINARY = "binary_data", "binary_data_size", "binary_data_output"
_DATATYPES = {each.name: each for each in (FP32, INT64)}
_LEAST, _MOST = -(2**63), 2**63 - 1
_REPORTED = 100

Inputs = list[tuple[pb.ModelInferRequest.InferInputTensor, Any, bytes | None]]
"""Each tensor, its JSON data, and its binary contents if it has those instead."""


@dataclass(frozen=True)
class Wanted:
    """Form of the response: which outputs are binary; the others are JSON arrays."""

    by_name: dict[str, bool]
    default: bool

    def is_binary(self, name: str) -> bool:
        """Return whether an output is binary."""
        return self.by_name.get(name, self.default)


def decoded(data: bytes, header_length: str, model: str, version: str) -> tuple[bytes, Wanted]:
    """Return the serialised ``ModelInferRequest`` of a body, and the form of the response.

    Args:
        data: body.
        header_length: value of ``Inference-Header-Content-Length``; empty if absent.
        model: name of the model, of the path.
        version: of the model; empty for the newest.

    Raises:
        InvalidArgumentError, ResourceExhaustedError: A field is wrong, or exceeds a limit.
    """
    document, binary = _split(data, header_length)
    content = as_object(parsed(document), "body")
    request = pb.ModelInferRequest(model_name=model, model_version=version)
    request.id = as_text(content.get("id"), "id")
    parameters = as_object(content.get("parameters"), "parameters")
    for name, value in parameters.items():
        _set_parameter(request.parameters[as_text(name, "parameters")], name, value)
    inputs, rest = _inputs(request, as_list(content.get("inputs"), "inputs"), binary)
    if rest:
        got = f"{len(rest)} bytes more than the inputs' binary_data_size"
        raise InvalidArgumentError("body", "binary data of the inputs alone", got)
    _fill(request, inputs)
    wanted = _wanted(request, as_list(content.get("outputs"), "outputs"), parameters)
    _check_values(request, wanted)
    return request.SerializeToString(), wanted


def encoded(response: pb.ModelInferResponse, wanted: Wanted) -> tuple[list[bytes], int | None]:
    """Return the parts of a body, and the size of the first if binary data follow it."""
    outputs: list[dict[str, Any]] = []
    binary: list[bytes] = []
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        described: dict[str, Any] = {
            "name": output.name,
            "datatype": output.datatype,
            "shape": list(output.shape),
        }
        if wanted.is_binary(output.name):
            described["parameters"] = {_BINARY_SIZE: len(raw)}
            binary.append(raw)
        else:
            described["data"] = np.frombuffer(raw, FP32.layout)
        outputs.append(described)
    document = {
        "model_name": response.model_name,
        "model_version": response.model_version,
        **({"id": response.id} if response.id else {}),
        "outputs": outputs,
    }
    # Numbers that are not finite, which JSON lacks, become null.
    head = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    return [head, *binary], len(head) if binary else None


def _split(data: bytes, header_length: str) -> tuple[bytes, memoryview]:
    """Return the JSON document of a body, and the binary data that follow."""
    if not header_length:
        return data, memoryview(b"")
    length = int(header_length[:20]) if header_length.isdecimal() else -1
    if not 0 < length <= len(data):
        expected = f"1 to {len(data)}, the bytes of the body"
        field = "Inference-Header-Content-Length"
        raise InvalidArgumentError(field, expected, repr(header_length))
    return data[:length], memoryview(data)[length:]


def _inputs(
    request: pb.ModelInferRequest, described: list[Any], binary: memoryview
) -> tuple[Inputs, memoryview]:
    """Add the tensors of a request; return them with their contents, and the rest of the data."""
    inputs: Inputs = []
    for i, each in enumerate(described):
        field = f"inputs[{i}]"
        one = as_object(each, field)
        tensor = request.inputs.add(
            name=as_text(one.get("name"), f"{field}.name"),
            datatype=as_text(one.get("datatype"), f"{field}.datatype"),
            shape=_shape(as_list(one.get("shape"), f"{field}.shape"), f"{field}.shape"),
        )
        parameters = as_object(one.get("parameters"), f"{field}.parameters")
        contents = None
        if _BINARY_SIZE in parameters:
            size = parameters[_BINARY_SIZE]
            if type(size) is not int or not 0 <= size <= len(binary):
                expected = f"0 to {len(binary)}, the bytes that follow"
                of = f"{field}.parameters.{_BINARY_SIZE}"
                raise InvalidArgumentError(of, expected, kind_of(size))
            contents, binary = bytes(binary[:size]), binary[size:]
            if "data" in one:
                raise InvalidArgumentError(f"{field}.data", "none beside binary data", "some")
        inputs.append((tensor, one.get("data"), contents))
    return inputs, binary


def _fill(request: pb.ModelInferRequest, inputs: Inputs) -> None:
    """Set the contents of the tensors: all raw if one is binary, else all typed."""
    raw = any(contents is not None for _, _, contents in inputs)
    for i, (tensor, data, contents) in enumerate(inputs):
        if contents is None:
            values = _values(tensor, data, f"inputs[{i}].data")
            if not raw and values is not None:
                field = _DATATYPES[tensor.datatype].field
                getattr(tensor.contents, field).extend(values.tolist())
            contents = b"" if values is None else values.tobytes()
        if raw:
            request.raw_input_contents.append(contents)


def _values(
    tensor: pb.ModelInferRequest.InferInputTensor, data: Any, field: str
) -> npt.NDArray[Any] | None:
    """Return the flat values of nested arrays; None for a datatype that no input has."""
    datatype = _DATATYPES.get(tensor.datatype)
    if datatype is None or (tensor.name in INPUTS and INPUTS[tensor.name] != datatype):
        return None  # the servicer rejects it
    flat, kinds = _flat(as_list(data, field), field)
    expected = "integers of 64 bits" if datatype is INT64 else "numbers"
    allowed = {int} if datatype is INT64 else {int, float}
    if not kinds <= allowed:
        other = next(value for value in flat if type(value) not in allowed)
        raise InvalidArgumentError(field, expected, kind_of(other))
    try:
        with np.errstate(over="ignore"):  # infinite: the servicer rejects it
            return np.array(flat, datatype.layout)
    except OverflowError:
        raise InvalidArgumentError(field, expected, "a larger one") from None


def _flat(values: list[Any], field: str) -> tuple[list[Any], set[type]]:
    """Return the values of nested arrays, and their types."""
    kinds = set(map(type, values))
    while list in kinds:
        if len(kinds) > 1:
            raise InvalidArgumentError(field, "arrays of equal depth", "numbers beside arrays")
        values = list(chain.from_iterable(values))
        kinds = set(map(type, values))
    return values, kinds


def _shape(given: list[Any], field: str) -> list[int]:
    for each in given:
        if type(each) is not int or not _LEAST <= each <= _MOST:
            raise InvalidArgumentError(field, "integers of 64 bits", kind_of(each))
    return given


def _wanted(
    request: pb.ModelInferRequest, described: list[Any], parameters: dict[str, Any]
) -> Wanted:
    """Add the requested outputs of a request; return the form of the response."""
    default = _flag(parameters.get(_ALL_BINARY, False), f"parameters.{_ALL_BINARY}")
    by_name: dict[str, bool] = {}
    for i, each in enumerate(described):
        field = f"outputs[{i}]"
        one = as_object(each, field)
        name = as_text(one.get("name"), f"{field}.name")
        request.outputs.add(name=name)
        own = as_object(one.get("parameters"), f"{field}.parameters")
        if "classification" in own:
            of = f"{field}.parameters.classification"
            raise InvalidArgumentError(of, "none: outputs are images", "one")
        by_name[name] = _flag(own.get(_BINARY, default), f"{field}.parameters.{_BINARY}")
    return Wanted(by_name, default)


def _flag(value: Any, field: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidArgumentError(field, "true or false", kind_of(value))
    return value


def _set_parameter(parameter: pb.InferParameter, name: str, value: Any) -> None:
    field = f"parameters.{name[:_REPORTED]}"
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, int) and _LEAST <= value <= _MOST:
        parameter.int64_param = value
    elif isinstance(value, float):
        parameter.double_param = value
    elif isinstance(value, str):
        parameter.string_param = as_text(value, field)
    else:
        expected = "a truth value, an integer of 64 bits, a number or a string"
        raise InvalidArgumentError(field, expected, kind_of(value))


def _check_values(request: pb.ModelInferRequest, wanted: Wanted) -> None:
    """Check that the outputs which are JSON arrays have few values: each about as many as x."""
    raw = [len(each) // FP32.layout.itemsize for each in request.raw_input_contents]
    sizes = raw or [len(tensor.contents.fp32_contents) for tensor in request.inputs]
    names = [output.name for output in request.outputs] or OUTPUTS
    values = max(sizes, default=0) * sum(not wanted.is_binary(name) for name in names)
    if values > MAX_VALUES:
        expected = f"at most {MAX_VALUES} JSON values in the response: ask for binary_data"
        raise ResourceExhaustedError("outputs", expected, values)
