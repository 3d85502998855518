"""The Open Inference Protocol: every model under its name, for existing clients.

Inputs: ``x`` FP32 [-1, C, H, W]; exactly one of ``sigma``, ``alpha_bar``, ``time`` FP32 [-1];
optionally ``label`` INT64 [-1] and ``window`` INT64 [-1]. Outputs: ``denoised`` and ``score`` FP32
[-1, C, H, W], ``log_evidence`` FP32 [-1, H, W] where the model has it; only what is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from els_proto.inference import grpc_service_pb2 as pb
from els_proto.inference.grpc_service_pb2_grpc import GRPCInferenceServiceServicer
from els_service.config import Limits
from els_service.denoisers.base import Denoised, DenoiserInfo, Query, make_query, score
from els_service.engine.engine import Engine
from els_service.errors import InvalidArgumentError, NotFoundError
from els_service.version import FULL
from els_service.wire import codec
from els_service.wire.calls import Context, deadline_of

_VERSION = "1"
_LEVELS = ("sigma", "alpha_bar", "time")

_INPUTS: dict[str, tuple[str, npt.DTypeLike, str]] = {
    "x": ("FP32", "<f4", "fp32_contents"),
    **dict.fromkeys(_LEVELS, ("FP32", "<f4", "fp32_contents")),
    "label": ("INT64", "<i8", "int64_contents"),
    "window": ("INT64", "<i8", "int64_contents"),
}
"""name → datatype, layout of raw contents, field of typed contents."""

_OUTPUTS: dict[str, Callable[[Query, Denoised], Tensor | None]] = {
    "denoised": lambda query, answer: answer.mean,
    "score": lambda query, answer: score(query, answer.mean),
    "log_evidence": lambda query, answer: answer.log_evidence,
}

Inputs = dict[str, npt.NDArray[Any]]


class InferenceService(GRPCInferenceServiceServicer):
    """The six base methods of the protocol."""

    def __init__(self, engine: Engine, limits: Limits, ready: Callable[[], bool]) -> None:
        self._engine, self._limits, self._ready = engine, limits, ready

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
        served = request.name in self._engine.models and request.version in ("", _VERSION)
        return pb.ModelReadyResponse(ready=served and self._ready())

    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, context: Context
    ) -> pb.ServerMetadataResponse:
        """Return name and version with commit."""
        return pb.ServerMetadataResponse(name="els-denoise", version=FULL)

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        """Return inputs and outputs of a model."""
        info = self._model(request.name, request.version)
        metadata = pb.ModelMetadataResponse.TensorMetadata
        shapes = {"x": [-1, *info.shape], "denoised": [-1, *info.shape], "score": [-1, *info.shape]}
        shapes["log_evidence"] = [-1, *info.shape[1:]]
        return pb.ModelMetadataResponse(
            name=request.name,
            versions=[_VERSION],
            platform=f"els-denoise_{info.kind}",
            inputs=[
                metadata(name=name, datatype=_INPUTS[name][0], shape=shapes.get(name, [-1]))
                for name in _inputs(info)
            ],
            outputs=[
                metadata(name=name, datatype="FP32", shape=shapes[name]) for name in _outputs(info)
            ],
        )

    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: Context
    ) -> pb.ModelInferResponse:
        """Return the requested outputs, as raw contents."""
        info = self._model(request.model_name, request.model_version)
        wanted = _wanted(request, info)
        query = _query(_decode(request, info), info, self._limits)
        per_image = {"log_evidence": math.prod(info.shape[1:])}
        numbers = sum(per_image.get(name, math.prod(info.shape)) for name in wanted)
        codec.check_answer_size("x.shape", 4 * len(query) * numbers, self._limits)
        answer = await self._engine.denoise(request.model_name, query, deadline_of(context))
        response = pb.ModelInferResponse(
            model_name=request.model_name, model_version=_VERSION, id=request.id
        )
        for name in wanted:
            tensor = _OUTPUTS[name](query, answer)
            if tensor is None:
                raise RuntimeError(f"{request.model_name} promised {name} and has none")
            response.outputs.add(name=name, datatype="FP32", shape=tensor.shape)
            response.raw_output_contents.append(tensor.contiguous().numpy().tobytes())
        return response

    def _model(self, name: str, version: str) -> DenoiserInfo:
        info = self._engine.denoiser(name).info
        if version not in ("", _VERSION):
            raise NotFoundError(f"model_version: expected {_VERSION}, got {version!r:.100}")
        return info


def _inputs(info: DenoiserInfo) -> list[str]:
    optional = {"label": bool(info.label_count), "window": bool(info.max_window)}
    return [name for name in _INPUTS if optional.get(name, True)]


def _outputs(info: DenoiserInfo) -> list[str]:
    return [name for name in _OUTPUTS if name != "log_evidence" or info.has_log_evidence]


def _wanted(request: pb.ModelInferRequest, info: DenoiserInfo) -> list[str]:
    """Return the names of the requested outputs; all where none is named."""
    known = _outputs(info)
    names = [output.name for output in request.outputs]
    for name in names:
        if name not in known:
            raise InvalidArgumentError("outputs", f"among {', '.join(known)}", repr(name)[:100])
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
    known = _inputs(info)
    decoded: Inputs = {}
    for i, tensor in enumerate(request.inputs):
        filled = [field.name for field, _ in tensor.contents.ListFields()]
        if raw and filled:
            raise InvalidArgumentError(f"inputs[{i}].contents", "none beside raw contents", filled)
        if tensor.name not in known:
            got = repr(tensor.name)[:100]
            raise InvalidArgumentError(f"inputs[{i}].name", f"among {', '.join(known)}", got)
        if tensor.name in decoded:
            raise InvalidArgumentError(f"inputs[{i}].name", "each name once", tensor.name)
        decoded[tensor.name] = _array(tensor, raw[i] if raw else None)
    return decoded


def _array(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None) -> npt.NDArray[Any]:
    """Return one input, of the shape and datatype that it declares."""
    datatype, layout, field = _INPUTS[tensor.name]
    if tensor.datatype != datatype:
        raise InvalidArgumentError(f"{tensor.name}.datatype", datatype, repr(tensor.datatype)[:100])
    shape = tuple(tensor.shape)
    # numpy would refuse a long shape, or a vast one that a 0 makes empty, in its own way.
    if len(shape) > 4 or min(shape, default=1) < 1:
        expected = "at most 4 positive dimensions"
        raise InvalidArgumentError(f"{tensor.name}.shape", expected, list(shape))
    count = math.prod(shape)
    if raw is not None:
        size = count * np.dtype(layout).itemsize
        if len(raw) != size:
            raise InvalidArgumentError(
                tensor.name, f"{size} bytes for {list(shape)}", f"{len(raw)} bytes"
            )
        return np.frombuffer(raw, layout).reshape(shape)
    values = getattr(tensor.contents, field)
    if len(values) != count:
        raise InvalidArgumentError(
            tensor.name, f"{count} values for {list(shape)}", f"{len(values)} values"
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
    sigma, alpha_bar, time = (
        _flat(name, inputs[name]).tolist() if name in inputs else [] for name in _LEVELS
    )
    level = codec.one_level(sigma, alpha_bar, time, info.schedule)
    return make_query(
        x,
        level,
        _flat("label", inputs["label"]).tolist() if "label" in inputs else (),
        codec.decode_windows(_flat("window", inputs["window"]).tolist())
        if "window" in inputs
        else (),
    )


def _flat(name: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the values of a per-image input, whatever axes of one they came with."""
    if max(values.shape, default=1) != values.size:
        raise InvalidArgumentError(f"{name}.shape", "[1] or [B]", list(values.shape))
    return values.reshape(-1)
