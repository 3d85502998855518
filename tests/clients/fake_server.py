"""A real gRPC server with arithmetic in place of denoisers; it records what it is asked.

The model's name says how a call goes: see ``_FAILURES`` and ``FakeDenoiser._enter``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager

import grpc
import numpy as np
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.denoise.v1 import denoise_pb2_grpc as pb_grpc

_READ = {pb.DTYPE_F32: "<f4", pb.DTYPE_F16: "<f2", pb.DTYPE_U8: "u1"}
_FAILURES = {
    "missing": (grpc.StatusCode.NOT_FOUND, "no model missing; there are: fashion-els, rgb"),
    "busy": (grpc.StatusCode.RESOURCE_EXHAUSTED, "count: expected at most 256, got 300"),
    "away": (grpc.StatusCode.UNAVAILABLE, "draining"),
    "broken": (grpc.StatusCode.INTERNAL, "internal error"),
}
MODELS = {
    "fashion-els": pb.Model(
        name="fashion-els",
        kind="analytic",
        machine="els",
        padding="zeros",
        channels=1,
        height=4,
        width=6,
        window=pb.WindowTable(sigma=[0.1, 10.0], k=[3, 5], max_k=11),
        schedule="cosine",
        label_count=2,
        label_names=["Boot", "Bag"],
        limits=pb.Limits(max_images=256, max_steps=1000, max_message_bytes=2**26, max_sigma=80.0),
        bank=pb.Bank(fingerprint="ab", images=7, source="a box", licence="MIT"),
        batch_invariant=True,
        has_log_evidence=True,
        implementation="cpu",
    ),
    "rgb": pb.Model(name="rgb", kind="gaussian", channels=3, height=4, width=6),
}


class FakeDenoiser(pb_grpc.DenoiserServiceServicer):
    """Answers denoised = 2x, score = -x, evidence = its sum over C; samples count up.

    ``cancelled`` is set when the caller of a slow or endless call is gone.
    """

    def __init__(self) -> None:
        self.requests: list[Message] = []
        self.cancelled = threading.Event()

    def Denoise(
        self, request: pb.DenoiseRequest, context: grpc.ServicerContext
    ) -> pb.DenoiseResponse:
        self._enter(request, request.model, context)
        x = values(request.x)
        evidence = tensor(x.sum(1)) if request.return_log_evidence else None
        return pb.DenoiseResponse(denoised=tensor(2 * x), log_evidence=evidence)

    def Score(self, request: pb.ScoreRequest, context: grpc.ServicerContext) -> pb.ScoreResponse:
        self._enter(request, request.model, context)
        return pb.ScoreResponse(score=tensor(-values(request.x)))

    def Sample(
        self, request: pb.SampleRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.SampleResponse]:
        self._enter(request, request.model, context)
        model = MODELS.get(request.model, MODELS["fashion-els"])
        shape = (request.count, model.channels, model.height, model.width)
        for index in range(1, request.steps + 1):
            last = index == request.steps
            x = tensor(np.full(shape, index / request.steps))
            denoised = x if last else tensor(np.zeros(shape))
            yield pb.SampleResponse(
                index=index,
                total=request.steps,
                x=x if request.return_x or last else None,
                denoised=denoised if request.return_denoised or last else None,
                alpha_bar=index / request.steps,
                noise=tensor(np.ones(shape)) if request.return_noise and index == 1 else None,
            )
            if request.model == "endless":
                self.cancelled.wait(30)

    def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.ServicerContext
    ) -> pb.ListModelsResponse:
        self.requests.append(request)
        return pb.ListModelsResponse(models=MODELS.values())

    def GetModel(
        self, request: pb.GetModelRequest, context: grpc.ServicerContext
    ) -> pb.GetModelResponse:
        self._enter(request, request.name, context)
        return pb.GetModelResponse(model=MODELS.get(request.name, MODELS["fashion-els"]))

    def _enter(self, request: Message, model: str, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        if model in _FAILURES:
            context.abort(*_FAILURES[model])
        if model == "flaky" and len(self.requests) < 3:
            context.abort(grpc.StatusCode.UNAVAILABLE, "not yet")
        if model in ("slow", "endless"):
            # Asked at once: the server never resumes a stream whose caller has left.
            gone = threading.Event()
            context.add_callback(gone.set)
            context.add_callback(self.cancelled.set)
        if model == "slow":
            gone.wait(30)
        if model == "picky":
            context.abort_with_status(bad_request({"x": "expected finite pixels, got NaN"}))


def values(x: pb.Tensor) -> np.ndarray:
    """Return the pixels of a tensor, bytes as the contract reads them."""
    array = np.frombuffer(x.data, _READ[x.dtype]).reshape(tuple(x.shape))
    return array / 127.5 - 1 if x.dtype == pb.DTYPE_U8 else array


def tensor(array: np.ndarray) -> pb.Tensor:
    """Return an f32 tensor."""
    data = array.astype("<f4").tobytes()
    return pb.Tensor(dtype=pb.DTYPE_F32, shape=array.shape, data=data)


def bad_request(violations: Mapping[str, str]) -> grpc.Status:
    """Return INVALID_ARGUMENT with details; its message names the first field alone."""
    detail = any_pb2.Any()
    detail.Pack(
        error_details_pb2.BadRequest(
            field_violations=[
                error_details_pb2.BadRequest.FieldViolation(field=field, description=text)
                for field, text in violations.items()
            ]
        )
    )
    field, text = next(iter(violations.items()))
    status = status_pb2.Status(
        code=code_pb2.INVALID_ARGUMENT, message=f"{field}: {text}", details=[detail]
    )
    answer: grpc.Status = rpc_status.to_status(status)
    return answer


@contextmanager
def served(denoiser: FakeDenoiser) -> Iterator[str]:
    """Serve on a free port and yield its address."""
    server = grpc.server(futures.ThreadPoolExecutor(4))
    pb_grpc.add_DenoiserServiceServicer_to_server(denoiser, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
