"""The Open Inference Protocol: every model under its name, for existing clients.

What a model takes and gives is told in ``signatures``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from els_proto.inference import grpc_service_pb2 as pb
from els_service.config import Limits
from els_service.denoisers.base import Denoised, DenoiserInfo, Query, make_query, score
from els_service.engine.engine import Engine
from els_service.errors import ElsError, InvalidArgumentError
from els_service.version import FULL
from els_service.wire import codec
from els_service.wire.administration_service import EXTENSIONS, Administration, Changed, platform_of
from els_service.wire.calls import Context
from els_service.wire.signatures import FP32, INPUTS, LEVELS, inputs_of, outputs_of
from els_service.wire.terms import terms_of

_OUTPUTS: dict[str, Callable[[Query, Denoised], Tensor | None]] = {
    "denoised": lambda query, answer: answer.mean,
    "score": lambda query, answer: score(query, answer.mean),
    "log_evidence": lambda query, answer: answer.log_evidence,
}

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
                metadata(name=name, datatype=INPUTS[name].name, shape=[-1, *shape])
                for name, shape in inputs_of(info).items()
            ],
            outputs=[
                metadata(name=name, datatype=FP32.name, shape=[-1, *shape])
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
        numbers = sum(math.prod(shapes[name]) for name in wanted)
        size = 4 * len(query) * numbers + len(request.id.encode())
        codec.check_answer_size("x.shape", size, self._limits)
        answer = self._engine.denoise(
            request.model_name, query, terms_of(context), version=request.model_version
        )
        if not isinstance(answer, Denoised):
            answer = await answer
        response = pb.ModelInferResponse(
            model_name=request.model_name, model_version=str(entry.version), id=request.id
        )
        for name in wanted:
            tensor = _OUTPUTS[name](query, answer)
            if tensor is None:
                raise RuntimeError(f"{request.model_name} promised {name} and has none")
            response.outputs.add(name=name, datatype="FP32", shape=tensor.shape)
            response.raw_output_contents.append(tensor.contiguous().numpy().tobytes())
        return response


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
        filled = [field.name for field, _ in tensor.contents.ListFields()]
        if raw and filled:
            raise InvalidArgumentError(f"inputs[{i}].contents", "none beside raw contents", filled)
        if tensor.name not in known:
            got = repr(tensor.name[:100])
            raise InvalidArgumentError(f"inputs[{i}].name", f"among {', '.join(known)}", got)
        if tensor.name in decoded:
            raise InvalidArgumentError(f"inputs[{i}].name", "each name once", tensor.name)
        decoded[tensor.name] = _array(tensor, raw[i] if raw else None)
    return decoded


def _array(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None) -> npt.NDArray[Any]:
    """Return one input, of the shape and datatype that it declares."""
    datatype = INPUTS[tensor.name]
    layout = datatype.layout
    if tensor.datatype != datatype.name:
        got = repr(tensor.datatype[:100])
        raise InvalidArgumentError(f"{tensor.name}.datatype", datatype.name, got)
    # numpy would refuse a long shape, or a vast one that a 0 makes empty, in its own way.
    if len(tensor.shape) > 4 or min(tensor.shape, default=1) < 1:
        expected, shown = "at most 4 positive dimensions", list(tensor.shape[: codec.SHOWN])
        raise InvalidArgumentError(f"{tensor.name}.shape", expected, shown)
    shape = tuple(tensor.shape)
    count = math.prod(shape)
    if raw is not None:
        size = count * np.dtype(layout).itemsize
        if len(raw) != size:
            raise InvalidArgumentError(
                tensor.name, f"{size} bytes for {list(shape)}", f"{len(raw)} bytes"
            )
        return np.frombuffer(raw, layout).reshape(shape)
    values = getattr(tensor.contents, datatype.field)
    if len(values) != count:
        raise InvalidArgumentError(
            tensor.name, f"{count} values for {list(shape)}", f"{len(values)} values"
        )
    return np.array(values, layout).reshape(shape)


def _query(inputs: Inputs, info: DenoiserInfo, limits: Limits) -> Query:
    """Return the query of decoded inputs."""
    if "x" not in inputs:
        raise InvalidArgumentError("inputs", "x among them", sorted(inputs))
    codec.check_shape(inputs["x"].shape, "x", limits.max_images)
    x = np.array(inputs["x"], np.float32)
    codec.check_finite(x.reshape(-1), "x")
    sigma, alpha_bar, time = (
        _flat(name, inputs[name], limits).tolist() if name in inputs else [] for name in LEVELS
    )
    level = codec.one_level(sigma, alpha_bar, time, info.schedule)
    return make_query(
        x,
        level,
        _flat("label", inputs["label"], limits).tolist() if "label" in inputs else (),
        codec.decode_windows(_flat("window", inputs["window"], limits).tolist())
        if "window" in inputs
        else (),
    )


def _flat(name: str, values: npt.NDArray[Any], limits: Limits) -> npt.NDArray[Any]:
    """Return the values of a per-image input, whatever axes of one they came with."""
    codec.check_lengths(limits, **{name: values.reshape(-1)})
    if max(values.shape, default=1) != values.size:
        raise InvalidArgumentError(f"{name}.shape", "[1] or [B]", list(values.shape))
    return values.reshape(-1)
