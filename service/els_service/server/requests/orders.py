"""``ModelInfer`` requests to queries; pure but for what is kept of them, every byte checked.

Two parameters of a request are known, under the names that Triton gives them: ``priority``, and
``timeout`` in microseconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from els_proto.denoise.v1.denoise_pb2 import DTYPE_F32
from els_proto.inference import grpc_service_pb2 as pb
from els_service.config import Limits
from els_service.denoisers.base import DenoiserInfo, Query, make_query
from els_service.engine.registry import ModelRegistry, ModelVersion
from els_service.engine.request_context import PRIORITIES
from els_service.errors import InvalidArgumentError
from els_service.server.requests import tensors
from els_service.server.requests.envelopes import share
from els_service.server.requests.frames import frame_of
from els_service.server.requests.kept import KEY_BYTES, Envelope, Kept, Recognised
from els_service.server.requests.signatures import FP32, INPUTS, LEVELS, inputs_of, outputs_of

_MAX_TIMEOUT_US = 2**63 - 1

Inputs = dict[str, npt.NDArray[Any]]


@dataclass(eq=False, slots=True)
class Order(Envelope):
    """A ``ModelInfer`` request without its pixels and its id."""

    outputs: list[str]
    """Names, in order."""
    size: int
    """Bytes of the answer's tensors."""
    response: pb.ModelInferResponse
    """But for id and contents."""

    def answer(self, name: str, contents: Sequence[bytes]) -> bytes:
        """Return the bytes of the answer to a request of this id, from those of each output."""
        if self.frame is not None and not name:
            return self.frame.around(contents[0])
        response = pb.ModelInferResponse()
        response.CopyFrom(self.response)
        response.id = name
        response.raw_output_contents.extend(contents)
        return response.SerializeToString()

    def query(self, x: npt.NDArray[np.float32]) -> Query:
        """Return the query of pixels [B, C, H, W], of which it makes a copy.

        Raises:
            InvalidArgumentError: One is not finite, or vast.
        """
        pixels = np.array(x, np.float32)
        tensors.check_finite(pixels.reshape(-1), "x")
        return self.ask(pixels)


class Orders:
    """Opens ``ModelInfer`` requests."""

    def __init__(self, models: ModelRegistry, limits: Limits) -> None:
        self._models, self._limits = models, limits
        self._kept: Kept[Order] = Kept(models)
        self.recognise = self._kept.recognise

    def open(
        self, request: pb.ModelInferRequest | Recognised[Order]
    ) -> tuple[ModelVersion, Order, Query, str]:
        """Return a request's model, order, query and id; takes contents and id out of the request.

        Raises:
            NotFoundError, UnavailableError: No such model.
            InvalidArgumentError, ResourceExhaustedError: A field is wrong, or asks for too much.
        """
        if isinstance(request, Recognised):
            entry, order, view = request.open()
            pixels = tensors.decode_pixels(view, DTYPE_F32, "x", order.blank.pixels.shape)
            return entry, order, order.ask(pixels), ""
        name = request.id
        request.ClearField("id")
        raw: Sequence[bytes] = request.raw_input_contents
        key: tuple[bytes, ...] = ()
        # More buffers than there are inputs are wrong, and may be millions.
        if 0 < len(raw) <= len(INPUTS):
            raw = raw[:]
            request.ClearField("raw_input_contents")
            key = request.SerializeToString(), *raw[1:]
        kept = self._kept.get(key)
        if kept is not None:
            entry, order = kept
            x = _buffer("x", raw[0], FP32.layout, order.blank.pixels.shape)
            if not order.known:
                self._learn(request, raw, order)
        else:
            entry = self._models.entry(request.model_name, request.model_version)
            inputs = decode_inputs(request, raw, entry.info)
            order = seal(request, inputs, entry, self._limits)
            x = inputs["x"]
            if key and request.inputs[0].name == "x" and sum(map(len, key)) <= KEY_BYTES:
                self._kept.put(key, order)
        # An id of megabytes is not copied to be measured.
        length = len(name) if name.isascii() else len(name.encode())
        tensors.check_answer_size("x.shape", order.size + length, self._limits)
        return entry, order, order.query(x), name

    def _learn(self, request: pb.ModelInferRequest, raw: Sequence[bytes], order: Order) -> None:
        """Recognise such requests where they have no id, and write their answers at once."""

        def asks(pixels: bytes) -> bytes:
            del request.raw_input_contents[:]
            request.raw_input_contents.extend([pixels, *raw[1:]])
            return request.SerializeToString()

        self._kept.learn(order, asks, len(raw[0]))
        if len(order.outputs) == 1:
            order.frame = frame_of(lambda pixels: order.answer("", [pixels]), order.size)


def seal(
    request: pb.ModelInferRequest, inputs: Inputs, entry: ModelVersion, limits: Limits
) -> Order:
    """Return the order of a request with decoded inputs.

    Raises:
        InvalidArgumentError: An input, output or parameter is wrong.
        ResourceExhaustedError: Too many images or pixels.
    """
    outputs = _wanted(request, entry.info)
    blank = _blank(inputs, entry.info, limits)
    response = pb.ModelInferResponse(
        model_name=request.model_name, model_version=str(entry.version)
    )
    size = 0
    for name in outputs:
        shape = len(blank), *outputs_of(entry.info)[name][1:]
        response.outputs.add(name=name, datatype=FP32.name, shape=shape)
        size += math.prod(shape) * FP32.layout.itemsize
    return Order(
        entry.info,
        share(blank, entry),
        request.model_name,
        request.model_version,
        blank,
        _parameter(request, "priority", PRIORITIES),
        _parameter(request, "timeout", _MAX_TIMEOUT_US) / 1e6,
        outputs,
        size,
        response,
    )


def _parameter(request: pb.ModelInferRequest, name: str, most: int) -> int:
    """Return a whole number among a request's parameters; 0 where it is not given."""
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


def _wanted(request: pb.ModelInferRequest, info: DenoiserInfo) -> list[str]:
    """Return the names of the requested outputs; all where none is named."""
    known = list(outputs_of(info))
    # One more than there can be is enough to tell that one comes twice.
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
    """Return the inputs by name, from raw contents or, where there are none, typed.

    Raises:
        InvalidArgumentError: A name, datatype, shape or the contents are wrong.
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
    """Return one input, of the shape and datatype that it declares."""
    datatype = INPUTS[name]
    layout = datatype.layout
    if tensor.datatype != datatype.name:
        got = repr(tensor.datatype[:100])
        raise InvalidArgumentError(f"{name}.datatype", datatype.name, got)
    # As in the codec: a slice of a repeated field is a list.
    shape = tuple(tensor.shape[: tensors.MAX_REPORTED])
    # numpy would refuse a long shape, or a vast one that a 0 makes empty, in its own way.
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


def _blank(inputs: Inputs, info: DenoiserInfo, limits: Limits) -> Query:
    """Return the query of decoded inputs, but for its pixels."""
    if "x" not in inputs:
        raise InvalidArgumentError("inputs", "x among them", sorted(inputs))
    shape = inputs["x"].shape
    tensors.check_shape(shape, "x", limits)
    tensors.check_pixels("x.shape", inputs["x"].size, limits)
    sigma, alpha_bar, time = (_per_image(name, inputs, limits) for name in LEVELS)
    level = tensors.one_level(sigma, alpha_bar, time, info.levels)
    windows = tensors.decode_windows(_per_image("window", inputs, limits))
    labels = _per_image("label", inputs, limits)
    return make_query(np.broadcast_to(np.float32(0), shape), level, labels, windows)


def _per_image(name: str, inputs: Inputs, limits: Limits) -> list[Any]:
    """Return the values of an input if it is there, whatever axes of one they came with."""
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
