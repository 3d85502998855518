"""The Open Inference Protocol: every model under its name, for existing clients.

What a model takes and gives is told in ``signatures``. Two parameters of a request are known, under
the names that Triton gives them: ``priority``, and ``timeout`` in microseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from els_proto.inference import grpc_service_pb2 as pb
from els_service.config import Limits
from els_service.denoisers.base import Denoised, DenoiserInfo, Query, make_query, score
from els_service.engine.engine import Engine
from els_service.engine.terms import PRIORITIES, Terms
from els_service.errors import ElsError, InvalidArgumentError
from els_service.version import FULL
from els_service.wire import codec
from els_service.wire.administration_service import EXTENSIONS, Administration, Changed, platform_of
from els_service.wire.calls import Context
from els_service.wire.signatures import FP32, INPUTS, LEVELS, inputs_of, outputs_of
from els_service.wire.terms import terms_of

_OUTPUTS: dict[str, Callable[[Query, Denoised], npt.NDArray[np.float32]]] = {
    "denoised": lambda query, answer: answer.pixels,
    "score": lambda query, answer: score(query, answer.mean).numpy(),
    "log_evidence": lambda query, answer: _evidence(answer),
}

_MAX_TIMEOUT_US = 2**63 - 1

Inputs = dict[str, npt.NDArray[Any]]


class InferenceService(Administration):
    """The base methods of the protocol; the extensions are inherited."""

    def __init__(
        self, engine: Engine, limits: Limits, ready: Callable[[], bool], changed: Changed
    ) -> None:
        super().__init__(engine, limits, changed)
        self._ready = ready

    async def ServerLive(
        self, request: pb.ServerLiveRequest, context: Context
    ) -> pb.ServerLiveResponse:
        """Return true: the process answers."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(
        self, request: pb.ServerReadyRequest, context: Context
    ) -> pb.ServerReadyResponse:
        """Return whether requests are taken."""
        return pb.ServerReadyResponse(ready=self._ready())

    async def ModelReady(
        self, request: pb.ModelReadyRequest, context: Context
    ) -> pb.ModelReadyResponse:
        """Return whether a model takes requests; an unknown one does not."""
        try:
            self._engine.models.entry(request.name, request.version)
        except ElsError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self._ready())

    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, context: Context
    ) -> pb.ServerMetadataResponse:
        """Return name and version with commit."""
        return pb.ServerMetadataResponse(name="els-denoise", version=FULL, extensions=EXTENSIONS)

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        """Return inputs and outputs of a model."""
        entry = self._engine.models.entry(request.name, request.version)
        metadata = pb.ModelMetadataResponse.TensorMetadata
        info = entry.info
        return pb.ModelMetadataResponse(
            name=request.name,
            versions=[str(entry.version)],
            platform=platform_of(info),
            inputs=[
                metadata(name=name, datatype=INPUTS[name].name, shape=shape)
                for name, shape in inputs_of(info).items()
            ],
            outputs=[
                metadata(name=name, datatype=FP32.name, shape=shape)
                for name, shape in outputs_of(info).items()
            ],
        )

    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: Context
    ) -> pb.ModelInferResponse:
        """Return the requested outputs, as raw contents."""
        entry = self._engine.models.entry(request.model_name, request.model_version)
        info = entry.info
        wanted = _wanted(request, info)
        query = _query(_decode(request, info), info, self._limits)
        shapes = outputs_of(info)
        numbers = sum(-math.prod(shapes[name]) for name in wanted)
        size = 4 * len(query) * numbers + len(request.id.encode())
        codec.check_answer_size("x.shape", size, self._limits)
        answer = self._engine.denoise(
            request.model_name, query, _terms(request, context), version=request.model_version
        )
        if not isinstance(answer, Denoised):
            answer = await answer
        response = pb.ModelInferResponse(
            model_name=request.model_name, model_version=str(entry.version), id=request.id
        )
        for name in wanted:
            array = _OUTPUTS[name](query, answer)
            response.outputs.add(name=name, datatype="FP32", shape=array.shape)
            response.raw_output_contents.append(array.tobytes())
        return response


def _evidence(answer: Denoised) -> npt.NDArray[np.float32]:
    if answer.log_evidence is None:
        raise RuntimeError("the model promised log_evidence and has none")
    return answer.log_evidence.numpy()


def _terms(request: pb.ModelInferRequest, context: Context) -> Terms:
    if not request.parameters:
        return terms_of(context)
    priority = _parameter(request, "priority", PRIORITIES)
    timeout_us = _parameter(request, "timeout", _MAX_TIMEOUT_US)
    return terms_of(context, priority, timeout_us / 1e6)


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


def _decode(request: pb.ModelInferRequest, info: DenoiserInfo) -> Inputs:
    """Return the inputs by name, raw or typed."""
    raw = request.raw_input_contents
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
    shape = tuple(tensor.shape[: codec.SHOWN])
    # numpy would refuse a long shape, or a vast one that a 0 makes empty, in its own way.
    if len(shape) > 4 or min(shape, default=1) < 1:
        expected = "at most 4 positive dimensions"
        raise InvalidArgumentError(f"{name}.shape", expected, list(shape))
    count = math.prod(shape)
    if raw is not None:
        size = count * layout.itemsize
        if len(raw) != size:
            raise InvalidArgumentError(name, f"{size} bytes for {list(shape)}", f"{len(raw)} bytes")
        return np.frombuffer(raw, layout).reshape(shape)
    values = getattr(tensor.contents, datatype.field)[:]
    if len(values) != count:
        raise InvalidArgumentError(
            name, f"{count} values for {list(shape)}", f"{len(values)} values"
        )
    return np.array(values, layout).reshape(shape)


def _query(inputs: Inputs, info: DenoiserInfo, limits: Limits) -> Query:
    """Return the query of decoded inputs."""
    if "x" not in inputs:
        raise InvalidArgumentError("inputs", "x among them", sorted(inputs))
    codec.check_shape(inputs["x"].shape, "x", limits)
    codec.check_pixels("x.shape", inputs["x"].size, limits)
    x = np.array(inputs["x"], np.float32)
    codec.check_finite(x.reshape(-1), "x")
    sigma, alpha_bar, time = (_per_image(name, inputs, limits) for name in LEVELS)
    level = codec.one_level(sigma, alpha_bar, time, info.levels)
    windows = codec.decode_windows(_per_image("window", inputs, limits))
    return make_query(x, level, _per_image("label", inputs, limits), windows)


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
