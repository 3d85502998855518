"""Decoding of ``ModelInfer`` requests; encoding of responses.

Two request parameters are supported, named as in Triton: ``priority``, and ``timeout`` in
microseconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from els_proto.inference import grpc_service_pb2 as pb
from els_service.config import Limits
from els_service.denoisers.base import DenoiserInfo, Query, make_query
from els_service.denoisers.levels import from_sigma
from els_service.engine.model_versions import ModelVersion
from els_service.engine.registry import ModelRegistry
from els_service.engine.request_context import PRIORITIES
from els_service.errors import InvalidArgumentError
from els_service.server.requests import forms, tensors
from els_service.server.requests.forms import Form, FormCache, field_head
from els_service.server.requests.signatures import (
    FP32,
    INPUTS,
    LEVELS,
    OUTPUTS,
    inputs_of,
    outputs_of,
)

_MAX_TIMEOUT_US = 2**63 - 1
_FIELDS = pb.ModelInferResponse.DESCRIPTOR.fields_by_name
_ID, _CONTENTS = _FIELDS["id"].number, _FIELDS["raw_output_contents"].number

Inputs = dict[str, npt.NDArray[Any]]


@dataclass(eq=False, slots=True)
class InferenceForm(Form):
    """Form of ``ModelInfer`` requests."""

    inputs: dict[str, tuple[int, ...]]
    """Name → shape of the inputs, in the order of the request."""
    level: str
    """Name of the level input if ``x`` is the only other input, else empty."""
    outputs: list[str]
    """Names of the outputs, in order."""
    size: int
    """Bytes of the response's tensors."""
    prefix: bytes
    """Bytes of the response up to its id."""
    declared: bytes
    """Bytes of the response's outputs without contents, which follow."""
    heads: list[bytes]
    """Tag and length of the contents of each output."""

    def write(self, request_id: bytes, contents: Sequence[npt.NDArray[np.float32]]) -> bytes:
        """Return the serialised response.

        Args:
            request_id: of the request, UTF-8.
            contents: of each output.
        """
        parts: list[Any] = [self.prefix]
        if request_id:
            parts += field_head(_ID, len(request_id)), request_id
        parts.append(self.declared)
        for head, array in zip(self.heads, contents, strict=True):
            parts += head, np.ascontiguousarray(array, "<f4")
        return b"".join(parts)


class InferenceMethod:
    """Decoder of ``ModelInfer`` requests.

    Args:
        models: served models.
        limits: of requests.
    """

    def __init__(self, models: ModelRegistry, limits: Limits) -> None:
        self._models, self._limits = models, limits
        self._forms: FormCache[InferenceForm] = FormCache()

    def read(
        self, request: pb.ModelInferRequest
    ) -> tuple[ModelVersion, InferenceForm, Query, bool]:
        """Return model, form and query of a request, and whether the model has checked the query.

        Raises:
            NotFoundError, UnavailableError: No such model.
            InvalidArgumentError, ResourceExhaustedError: A field is wrong, or exceeds a limit.
        """
        served = self._models.find(request.model_name, request.model_version)
        raw: Sequence[bytes] = request.raw_input_contents
        # A message may have millions of buffers; more than there are inputs are rejected below.
        raw = raw[:] if 0 < len(raw) <= len(INPUTS) else raw
        key = _key(request) if 0 < len(raw) == len(request.inputs) <= len(INPUTS) else None
        form = None if key is None else self._forms.get(key, served.info)
        if form is None:
            inputs = decode_inputs(request, raw, served.info)
            form = self._form(request, inputs, served)
            if key is not None and form.checked:
                self._forms.put(key, form)
        else:
            inputs = {
                name: _buffer(name, data, INPUTS[name].layout, shape)
                for (name, shape), data in zip(form.inputs.items(), raw, strict=True)
            }
        query, checked = self._query(inputs, form, served)
        # An ASCII id, which may have megabytes, is measured without a copy.
        name = request.id
        length = len(name) if name.isascii() else len(name.encode())
        tensors.check_answer_size("x.shape", form.size + length, self._limits)
        tensors.check_finite(query.pixels.reshape(-1), "x")
        return served, form, query, checked

    def _query(
        self, inputs: Inputs, form: InferenceForm, served: ModelVersion
    ) -> tuple[Query, bool]:
        """Return the query of decoded inputs, and whether the model has checked it."""
        limits, x = self._limits, inputs["x"]
        if form.checked and form.level == "sigma":
            level = from_sigma(_per_image("sigma", inputs, limits))
        else:
            sigma, alpha_bar, time = (_per_image(name, inputs, limits) for name in LEVELS)
            level = tensors.one_level(sigma, alpha_bar, time, served.info.levels)
        if form.checked and form.level and len(level) in (1, len(x)):
            # The same as below, in a third of the time.
            return Query(x, level.repeat(len(x)), form.labels, form.windows, ()), True
        windows = tensors.decode_windows(_per_image("window", inputs, limits))
        labels = _per_image("label", inputs, limits)
        query = make_query(x, level, labels, windows)
        return query, forms.check(served, query)

    def _form(
        self, request: pb.ModelInferRequest, inputs: Inputs, served: ModelVersion
    ) -> InferenceForm:
        info, limits = served.info, self._limits
        outputs = _requested_outputs(request, info)
        if "x" not in inputs:
            raise InvalidArgumentError("inputs", "x among them", sorted(inputs))
        shape = inputs["x"].shape
        tensors.check_shape(shape, "x", limits)
        tensors.check_pixels("x.shape", inputs["x"].size, limits)
        named = pb.ModelInferResponse(
            model_name=request.model_name, model_version=str(served.version)
        )
        prefix: bytes = named.SerializeToString()
        response, sizes = pb.ModelInferResponse(), []
        for name in outputs:
            of_output = shape[0], *outputs_of(info)[name][1:]
            if info.sizes is not None:
                of_output = *of_output[:-2], *shape[2:]
            response.outputs.add(name=name, datatype=FP32.name, shape=of_output)
            sizes.append(math.prod(of_output) * FP32.layout.itemsize)
        checked, labels, windows = forms.defaults(shape, served)
        others = [name for name in inputs if name != "x"]
        return InferenceForm(
            *(info, checked, shape, labels, windows),
            {name: array.shape for name, array in inputs.items()},
            others[0] if len(others) == 1 and others[0] in LEVELS else "",
            outputs,
            sum(sizes),
            prefix,
            response.SerializeToString(),
            [field_head(_CONTENTS, size) for size in sizes],
        )


def priority_of(request: pb.ModelInferRequest) -> int:
    """Return the priority of a request; 0 if it has none.

    Raises:
        InvalidArgumentError: It is not an integer in range.
    """
    return _parameter(request, "priority", PRIORITIES)


def timeout_s_of(request: pb.ModelInferRequest) -> float:
    """Return the seconds after which the response is useless; 0 if not given.

    Raises:
        InvalidArgumentError: It is not an integer number of microseconds in range.
    """
    return _parameter(request, "timeout", _MAX_TIMEOUT_US) / 1e6


def _key(request: pb.ModelInferRequest) -> tuple[Any, ...]:
    """Return the values that determine the form of a request with raw contents."""
    parts: list[Any] = [request.model_name, request.model_version]
    for tensor in request.inputs:
        shape = tuple(tensor.shape[: tensors.MAX_REPORTED])
        parts += tensor.name, tensor.datatype, shape, tensor.HasField("contents")
    parts += [output.name for output in request.outputs[: len(OUTPUTS) + 1]]
    return tuple(parts)


def _parameter(request: pb.ModelInferRequest, name: str, most: int) -> int:
    """Return an integer parameter of a request; 0 if not given."""
    if name not in request.parameters:
        return 0
    parameter = request.parameters[name]
    kind = parameter.WhichOneof("parameter_choice")
    if kind not in ("int64_param", "uint64_param"):
        raise InvalidArgumentError(
            f"parameters.{name}", "int64_param or uint64_param", kind or "nothing"
        )
    value = int(getattr(parameter, kind))
    if not 0 <= value <= most:
        raise InvalidArgumentError(f"parameters.{name}", f"0 to {most}", value)
    return value


def _requested_outputs(request: pb.ModelInferRequest, info: DenoiserInfo) -> list[str]:
    """Return the names of the requested outputs; all if none is named."""
    known = list(outputs_of(info))
    # One name more than there are outputs suffices to find a duplicate.
    names = [output.name for output in request.outputs[: len(known) + 1]]
    for name in names:
        if name not in known:
            raise InvalidArgumentError("outputs", f"among {', '.join(known)}", repr(name[:100]))
    if len(set(names)) < len(names):
        raise InvalidArgumentError("outputs", "each name once", names)
    return names or known


def decode_inputs(
    request: pb.ModelInferRequest, raw: Sequence[bytes], info: DenoiserInfo
) -> Inputs:
    """Return the inputs by name, from raw contents or, if there are none, from typed contents.

    Raises:
        InvalidArgumentError: A name, datatype, shape or contents are wrong.
    """
    if raw and len(raw) != len(request.inputs):
        raise InvalidArgumentError(
            "raw_input_contents", f"none or {len(request.inputs)} buffers", f"{len(raw)} buffers"
        )
    known = inputs_of(info)
    decoded: Inputs = {}
    for i, tensor in enumerate(request.inputs):
        name = tensor.name
        filled = tensor.HasField("contents") and [
            field.name for field, _ in tensor.contents.ListFields()
        ]
        if raw and filled:
            raise InvalidArgumentError(f"inputs[{i}].contents", "none beside raw contents", filled)
        if name not in known:
            expected = f"among {', '.join(known)}"
            raise InvalidArgumentError(f"inputs[{i}].name", expected, repr(name[:100]))
        if name in decoded:
            raise InvalidArgumentError(f"inputs[{i}].name", "each name once", name)
        decoded[name] = _array(name, tensor, raw[i] if raw else None)
    return decoded


def _array(
    name: str, tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None
) -> npt.NDArray[Any]:
    """Return one input with its declared shape and datatype."""
    datatype = INPUTS[name]
    layout = datatype.layout
    if tensor.datatype != datatype.name:
        got = repr(tensor.datatype[:100])
        raise InvalidArgumentError(f"{name}.datatype", datatype.name, got)
    # A slice of a repeated field is a list, faster than iteration.
    shape = tuple(tensor.shape[: tensors.MAX_REPORTED])
    # numpy would raise other errors for long shapes and for huge ones with a zero.
    if len(shape) > 4 or min(shape, default=1) < 1:
        expected = "at most 4 positive dimensions"
        raise InvalidArgumentError(f"{name}.shape", expected, list(shape))
    count = math.prod(shape)
    if raw is not None:
        return _buffer(name, raw, layout, shape)
    values = getattr(tensor.contents, datatype.field)[:]
    if len(values) != count:
        raise InvalidArgumentError(
            name, f"{count} values for {list(shape)}", f"{len(values)} values"
        )
    return np.array(values, layout).reshape(shape)


def _buffer(
    name: str, raw: bytes, layout: np.dtype[Any], shape: tuple[int, ...]
) -> npt.NDArray[Any]:
    size = math.prod(shape) * layout.itemsize
    if len(raw) != size:
        raise InvalidArgumentError(name, f"{size} bytes for {list(shape)}", f"{len(raw)} bytes")
    return np.frombuffer(raw, layout).reshape(shape)


def _per_image(name: str, inputs: Inputs, limits: Limits) -> list[Any]:
    """Return the values of an input, which may have further axes of length 1; [] if absent."""
    if name not in inputs:
        return []
    values = inputs[name]
    if max(values.shape, default=1) != values.size:
        raise InvalidArgumentError(f"{name}.shape", "[1] or [B]", list(values.shape))
    if values.size > limits.max_images:
        expected = f"at most one for each of {limits.max_images} images"
        raise InvalidArgumentError(name, expected, f"{values.size} values")
    flat: list[Any] = values.reshape(-1).tolist()
    return flat
