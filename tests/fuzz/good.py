"""Good requests of every RPC of both services, from which the nearly good ones are made."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st
from tests.support import networks
from tests.support.models_folder import (
    DOCUMENTS,
    LABELLED,
    LABELS,
    RGB,
    SHAPE,
    WITH_EVIDENCE,
    write_models,
)

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.inference import grpc_service_pb2 as oip
from els_service.engine.loaded_model import Statistics
from els_service.engine.model_versions import ModelVersion
from els_service.repository import ModelRepository
from els_service.server.requests.resume_token import encode_token

SERVICES: list[ServiceDescriptor] = [
    pb.DESCRIPTOR.services_by_name["DenoiserService"],
    oip.DESCRIPTOR.services_by_name["GRPCInferenceService"],
]
METHODS: list[MethodDescriptor] = [method for service in SERVICES for method in service.methods]
SPARE = "spare"
"""The one model that good requests unload; it has ``gaussian``'s shape."""
NETWORK = "network"
HILLS = "hills"
"""The one model of pictures: two scales, 7x8 and 14x16."""
_HILLS = "kind: picture\npictures: [hills.ppm]\npatch: 3\ncoarsest: 7\nscales: 2\nsteps: 2\n"
NAMES = [*DOCUMENTS, NETWORK, SPARE]
_SIZES = {pb.DTYPE_F32: 4, pb.DTYPE_F16: 2, pb.DTYPE_BF16: 2, pb.DTYPE_U8: 1}
_LEVELS = {"sigma": (1e-4, 1e6), "alpha_bar": (1e-11, 0.99999), "time": (1e-3, 1.0)}

names = st.sampled_from(NAMES)


def write_world(root: Path) -> Path:
    """Write the models that good requests name, and a canary's."""
    own = {SPARE: DOCUMENTS["gaussian"], "canary": DOCUMENTS["circular"]}
    write_models(root, DOCUMENTS | own)
    networks.write_folder(root / NETWORK, networks.config())
    (root / HILLS).mkdir()
    (root / HILLS / "model.yaml").write_text(_HILLS)
    (root / HILLS / "hills.ppm").write_bytes(b"P6 16 14 255\n" + bytes(range(224)) * 3)
    return root


@cache
def _entries() -> dict[str, ModelVersion]:
    """Return the models as a server would have them: what resume tokens depend on."""
    with tempfile.TemporaryDirectory() as folder:
        repository = ModelRepository(write_world(Path(folder) / "models"))
        infos = {name: repository.load(name).info for name in NAMES}
        return {
            name: ModelVersion(name, 1, info, None, Statistics(), repository.fingerprint(name))
            for name, info in infos.items()
        }


def shape_of(model: str) -> tuple[int, int, int]:
    """Return the shape of a model's images."""
    if model == NETWORK:
        return networks.SHAPE
    return RGB if model in ("gaussian", SPARE) else SHAPE


def _pixels(draw: st.DrawFn, shape: Sequence[int]) -> Any:
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return rng.normal(size=shape) * draw(st.sampled_from([1e-30, 1.0, 100.0, 1e8]))


def _level(draw: st.DrawFn, batch: int) -> tuple[str, list[float]]:
    name = draw(st.sampled_from(list(_LEVELS)))
    each = draw(st.sampled_from([1, batch]))
    return name, draw(st.lists(st.floats(*_LEVELS[name]), min_size=each, max_size=each))


def _labels(draw: st.DrawFn, model: str, batch: int) -> list[int]:
    size = draw(st.sampled_from([0, 1, batch]))
    highest = -1 if shape_of(model) == RGB else LABELS - 1
    return draw(st.lists(st.integers(-1, highest), min_size=size, max_size=size))


@st.composite
def queries(draw: st.DrawFn, kind: Any) -> Message:
    """Draw a request of Denoise or Score."""
    model, batch = draw(names), draw(st.integers(1, 4))
    shape = (batch, *shape_of(model))
    dtype = draw(st.sampled_from(list(_SIZES)))
    level, values = _level(draw, batch)
    pixels = _pixels(draw, shape)
    match dtype:
        case pb.DTYPE_F32:
            data = pixels.astype("<f4").tobytes()
        case pb.DTYPE_F16:
            data = np.clip(pixels, -6e4, 6e4).astype("<f2").tobytes()
        case pb.DTYPE_BF16:
            data = torch.from_numpy(pixels).to(torch.bfloat16).view(torch.int16).numpy().tobytes()
        case _:
            data = np.random.default_rng(1).bytes(pixels.size)
    with_variance = kind is pb.DenoiseRequest and model in WITH_EVIDENCE and draw(st.booleans())
    request: Message = kind(
        **({"return_variance": True} if with_variance else {}),
        model=model,
        x=pb.Tensor(dtype=dtype, shape=shape, data=data),
        level=pb.NoiseLevel(**{level: values}),
        labels=_labels(draw, model, batch),
        windows=draw(st.sampled_from([[], [3]])) if model in ("zeros", "local", "valid") else [],
        output_dtype=draw(st.sampled_from([0, 1, 2, 3])),
        return_log_evidence=model in WITH_EVIDENCE and draw(st.booleans()),
        priority=draw(st.integers(0, 3)),
        timeout_s=draw(st.sampled_from([0.0, 0.0, 1e-9, 1e-3, 1.0, 1e308])),
        version=draw(st.sampled_from(["", "", "1"])),
    )
    return request


@st.composite
def products(draw: st.DrawFn, kind: Any, direction: str) -> Message:
    """Draw a request of Vjp or Jvp, whose direction has that name."""
    query: Any = draw(queries(pb.ScoreRequest))
    data = _pixels(draw, tuple(query.x.shape)).astype("<f4").tobytes()
    request: Message = kind(
        **_common(query),
        output_dtype=query.output_dtype,
        return_evidence=draw(st.booleans()),
        evidence=draw(st.binary(max_size=100)),
        **{direction: pb.Tensor(dtype=pb.DTYPE_F32, shape=query.x.shape, data=data)},
    )
    return request


@st.composite
def explanations(draw: st.DrawFn) -> Message:
    """Draw a request of Explain."""
    query: Any = draw(queries(pb.ScoreRequest))
    top, images = draw(st.integers(0, 16)), draw(st.integers(0, 16))
    return pb.ExplainRequest(**_common(query), top=top, return_images=images)


@st.composite
def reports(draw: st.DrawFn) -> Message:
    """Draw a request of Originality."""
    query: Any = draw(queries(pb.ScoreRequest))
    return pb.OriginalityRequest(**_common(query), nearest=draw(st.integers(0, 50)))


def _common(query: Any) -> dict[str, Any]:
    names = ("model", "x", "level", "labels", "windows", "priority", "timeout_s", "version")
    return {name: getattr(query, name) for name in names}


@st.composite
def samples(draw: st.DrawFn) -> pb.SampleRequest:
    """Draw a request of Sample, some with a token of its own that was tampered with."""
    model, count, steps = draw(names), draw(st.integers(0, 3)), draw(st.integers(2, 5))
    sampler = draw(st.integers(0, 6))
    request = pb.SampleRequest(
        model=model,
        count=count,
        steps=steps,
        sampler=pb.Sampler.ValueType(sampler),
        seed=draw(st.integers(0, 2**64 - 1)),
        labels=_labels(draw, model, count or 1),
        return_x=draw(st.booleans()),
        return_denoised=draw(st.booleans()),
        return_noise=draw(st.booleans()),
        return_resume_token=draw(st.booleans()),
        output_dtype=pb.DType.ValueType(draw(st.integers(0, 3))),
        priority=draw(st.integers(0, 3)),
        first_image=draw(st.sampled_from([0, 0, 7, 2**63 - 1])),
    )
    if sampler != pb.SAMPLER_DDIM_RELEASED and draw(st.booleans()):
        shape = (draw(st.sampled_from([1, count or 1])), *shape_of(model))
        data = _pixels(draw, shape).astype("<f4").tobytes()
        request.start.CopyFrom(pb.Tensor(dtype=pb.DTYPE_F32, shape=shape, data=data))
        if draw(st.booleans()):
            request.steps, steps = 0, 3
            request.times.extend([0.9, 0.5, draw(st.floats(0.01, 0.4))])
        else:
            request.start_time = draw(st.floats(0.01, 1))
    if model in WITH_EVIDENCE and draw(st.booleans()):
        request.explain_steps.append(1)
        request.explain_top = draw(st.integers(0, 16))
        request.explain_images = draw(st.integers(0, 16))
    request.return_originality = model in LABELLED and draw(st.booleans())
    if sampler == pb.SAMPLER_DDPM:
        request.eta = draw(st.floats(0, 1))
    if sampler in (pb.SAMPLER_HEUN, pb.SAMPLER_EULER):
        request.churn = draw(st.floats(0, 2 * steps))
        request.churn_noise = draw(st.floats(0, 2))
    if draw(st.booleans()):
        images = (count or 1) * (2 if sampler == pb.SAMPLER_DPMPP_2M else 1)
        state = _pixels(draw, (images, *shape_of(model)))
        state *= draw(st.sampled_from([1.0, 1e5, 1e7, float("nan")]))
        index = draw(st.integers(0, steps))
        request.resume_token = encode_token(
            request, _entries()[model], index, torch.from_numpy(state)
        )
    return request


@st.composite
def pyramids(draw: st.DrawFn) -> pb.SampleRequest:
    """Draw a request of Sample for a picture: any size and mode."""
    count, size = draw(st.integers(0, 2)), draw(st.sampled_from([(0, 0), (3, 3), (9, 21)]))
    tileable = draw(st.booleans())
    request = pb.SampleRequest(
        model=HILLS,
        sampler=pb.SAMPLER_PYRAMID,
        count=count,
        steps=draw(st.sampled_from([0, 2, 3])),
        height=size[0],
        width=size[1],
        seed=draw(st.integers(0, 2**64 - 1)),
        tileable=tileable,
        symmetric=not tileable and draw(st.booleans()),
        return_x=draw(st.booleans()),
        return_denoised=draw(st.booleans()),
        return_resume_token=draw(st.booleans()),
        output_dtype=pb.DType.ValueType(draw(st.integers(0, 3))),
    )
    if draw(st.booleans()):
        images, plane = draw(st.sampled_from([1, count or 1])), (size[0] or 14, size[1] or 16)
        data = _pixels(draw, (images, 3, *plane)).astype("<f4").tobytes()
        shape = (images, 3, *plane)
        request.start.CopyFrom(pb.Tensor(dtype=pb.DTYPE_F32, shape=shape, data=data))
        if draw(st.booleans()):
            mask = np.random.default_rng(0).integers(0, 2, (images, 1, *plane)).astype("<f4")
            kept = pb.Tensor(dtype=pb.DTYPE_F32, shape=mask.shape, data=mask.tobytes())
            request.mask.CopyFrom(kept)
        else:
            request.start_time = draw(st.floats(0.01, 1))
    return request


@st.composite
def inferences(draw: st.DrawFn) -> oip.ModelInferRequest:
    """Draw a request of ModelInfer, raw or typed."""
    model, batch = draw(names), draw(st.integers(1, 4))
    shape = (batch, *shape_of(model))
    level, values = _level(draw, batch)
    request = oip.ModelInferRequest(model_name=model, id=draw(st.text(max_size=20)))
    inputs: dict[str, Any] = {
        "x": _pixels(draw, shape).astype("<f4"),
        level: np.array(values, "<f4"),
    }
    if labels := _labels(draw, model, batch):
        inputs["label"] = np.array(labels, "<i8")
    if shape_of(model) == RGB:
        inputs.pop("label", None)
    raw = draw(st.booleans())
    for name, array in inputs.items():
        datatype = "INT64" if name == "label" else "FP32"
        tensor = request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        if raw:
            request.raw_input_contents.append(array.tobytes())
        elif name == "label":
            tensor.contents.int64_contents.extend(array.tolist())
        else:
            tensor.contents.fp32_contents.extend(array.ravel().tolist())
    outputs = draw(st.sampled_from([[], ["denoised"], ["score", "denoised"], ["log_evidence"]]))
    request.outputs.extend(
        oip.ModelInferRequest.InferRequestedOutputTensor(name=n) for n in outputs
    )
    return request


def _log_settings(level: str) -> oip.LogSettingsRequest:
    value = oip.LogSettingsRequest.SettingValue(string_param=level)
    return oip.LogSettingsRequest(settings={"log_level": value})


_KNOWN: dict[str, st.SearchStrategy[Any]] = {
    "Denoise": queries(pb.DenoiseRequest),
    "DenoiseStream": queries(pb.DenoiseRequest),
    "Score": queries(pb.ScoreRequest),
    "Sample": samples(),
    "Vjp": products(pb.VjpRequest, "cotangent"),
    "Jvp": products(pb.JvpRequest, "tangent"),
    "Explain": explanations(),
    "Originality": reports(),
    "ModelInfer": inferences(),
    "GetModel": st.builds(pb.GetModelRequest, name=names),
    "ModelReady": st.builds(oip.ModelReadyRequest, name=names),
    "ModelMetadata": st.builds(oip.ModelMetadataRequest, name=names),
    "ModelConfig": st.builds(oip.ModelConfigRequest, name=names),
    "ModelStatistics": st.builds(oip.ModelStatisticsRequest, name=names),
    "RepositoryModelLoad": st.builds(oip.RepositoryModelLoadRequest, model_name=names),
    "RepositoryModelUnload": st.just(oip.RepositoryModelUnloadRequest(model_name=SPARE)),
    "LogSettings": st.sampled_from(["debug", "info", "warning"]).map(_log_settings),
}


def good(method: MethodDescriptor) -> st.SearchStrategy[Any]:
    """Return the good requests of a method; those of a method unknown here are empty."""
    kind = GetMessageClass(method.input_type)
    requests = _KNOWN.get(method.name, st.builds(kind))
    # What mutations change must not be what the next example starts from.
    return requests.map(lambda request: kind.FromString(request.SerializeToString()))
