"""A real gRPC server with arithmetic in place of denoisers; it records what it is asked.

The model's name says how a call goes: see ``_FAILURES`` and ``FakeDenoiser._enter``.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager

import grpc
import numpy as np
from google.protobuf.message import Message
from google.rpc import status_pb2
from grpc_health.v1 import health, health_pb2_grpc
from tests.support.fake_answers import (
    bad_request,
    evidence,
    explanation,
    originality,
    tensor,
    try_again,
    values,
)

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.denoise.v1 import denoise_pb2_grpc as pb_grpc
from els_proto.inference import grpc_service_pb2 as oip
from els_proto.inference import grpc_service_pb2_grpc as oip_grpc

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
        limits=pb.Limits(
            max_images=256,
            max_steps=1000,
            max_message_bytes=2**26,
            max_sigma=80.0,
            max_pixels=9,
            priority_levels=4,
        ),
        bank=pb.Bank(fingerprint="ab", images=7, source="a box", licence="MIT"),
        batch_invariant=True,
        has_log_evidence=True,
        implementation="cpu",
        version="3",
        memory_bytes=1000,
        step_seconds=0.25,
    ),
    "rgb": pb.Model(name="rgb", kind="gaussian", channels=3, height=4, width=6),
}


class FakeDenoiser(pb_grpc.DenoiserServiceServicer):
    """Answers denoised = 2x, score = -x, evidence = its sum over C; samples count up.

    ``cancelled`` is set when the caller of a slow or endless call is gone; ``metadata`` is what
    each call came with, ``calls`` how often each model was asked.
    """

    def __init__(self) -> None:
        self.requests: list[Message] = []
        self.metadata: list[dict[str, str | bytes]] = []
        self.remaining_s: list[float | None] = []
        self.calls: Counter[str] = Counter()
        self.cancelled = threading.Event()
        self.busy = threading.Lock()

    def Denoise(
        self, request: pb.DenoiseRequest, context: grpc.ServicerContext
    ) -> pb.DenoiseResponse:
        self._enter(request, request.model, context)
        x = values(request.x)
        evidence = tensor(x.sum(1)) if request.return_log_evidence else None
        variance = tensor(np.zeros(x.shape)) if request.return_variance else None
        return pb.DenoiseResponse(denoised=tensor(2 * x), log_evidence=evidence, variance=variance)

    def DenoiseStream(
        self, requests: Iterator[pb.DenoiseRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.DenoiseStreamResponse]:
        self.calls["stream"] += 1
        for request in requests:
            self.requests.append(request)
            self.calls[request.model] += 1
            if request.model == "drains" and self.calls["drains"] in (3, 5):
                context.abort(grpc.StatusCode.UNAVAILABLE, "draining")
            elif request.model in _FAILURES:
                code, text = _FAILURES[request.model]
                status = status_pb2.Status(code=code.value[0], message=text)
                yield pb.DenoiseStreamResponse(error=status)
            else:
                answer = pb.DenoiseResponse(denoised=tensor(2 * values(request.x)))
                yield pb.DenoiseStreamResponse(response=answer)

    def Score(self, request: pb.ScoreRequest, context: grpc.ServicerContext) -> pb.ScoreResponse:
        self._enter(request, request.model, context)
        return pb.ScoreResponse(score=tensor(-values(request.x)))

    def Vjp(self, request: pb.VjpRequest, context: grpc.ServicerContext) -> pb.VjpResponse:
        self._enter(request, request.model, context)
        denoised, vjp = tensor(2 * values(request.x)), tensor(2 * values(request.cotangent))
        return pb.VjpResponse(denoised=denoised, vjp=vjp, evidence=evidence(request))

    def Jvp(self, request: pb.JvpRequest, context: grpc.ServicerContext) -> pb.JvpResponse:
        self._enter(request, request.model, context)
        denoised, jvp = tensor(2 * values(request.x)), tensor(2 * values(request.tangent))
        return pb.JvpResponse(denoised=denoised, jvp=jvp, evidence=evidence(request))

    def Explain(
        self, request: pb.ExplainRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ExplainResponse]:
        self._enter(request, request.model, context)
        for index in range(request.x.shape[0]):
            shape = (1, *request.x.shape[1:])
            yield explanation(index, shape, request.top, request.return_images)

    def Originality(
        self, request: pb.OriginalityRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.OriginalityResponse]:
        self._enter(request, request.model, context)
        for index in range(request.x.shape[0]):
            yield originality(index, request.nearest)

    def Sample(
        self, request: pb.SampleRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.SampleResponse]:
        self._enter(request, request.model, context)
        model = MODELS.get(request.model, MODELS["fashion-els"])
        shape = (request.count, model.channels, model.height, model.width)
        first = int(request.resume_token or b"0") + 1
        for index in range(first, request.steps + 1):
            if index > first + 1 and request.model == "gives_way":
                yield pb.SampleResponse(resume_token=f"{index - 1}".encode())
                context.abort_with_status(try_again(0.15))
            if index > first + 1 and request.model in ("drains", "breaks"):
                if request.model == "drains":
                    yield pb.SampleResponse(resume_token=f"{index - 1}".encode())
                context.abort(grpc.StatusCode.UNAVAILABLE, "draining")
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
                resume_token=f"{index}".encode() if request.return_resume_token else b"",
                explanations=[
                    explanation(i, (1, *shape[1:]), request.explain_top, request.explain_images)
                    for i in range(request.count if index in request.explain_steps else 0)
                ],
                originality=[
                    originality(i, 8)
                    for i in range(request.count if last and request.return_originality else 0)
                ],
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
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.remaining_s.append(context.time_remaining())
        if request.name == "missing":
            context.abort(*_FAILURES[request.name])
        return pb.GetModelResponse(model=MODELS.get(request.name, MODELS["fashion-els"]))

    def _enter(self, request: Message, model: str, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.remaining_s.append(context.time_remaining())
        self.calls[model] += 1
        if model == "late":
            time.sleep(0.1)
        if model == "stalls":  # One at a time, and the second call takes long.
            with self.busy:
                time.sleep(0.4 if self.calls[model] == 2 else 0)
        if model == "full" and self.calls[model] < 3:
            context.abort_with_status(try_again(0.15))
        if model in _FAILURES:
            context.abort(*_FAILURES[model])
        if (
            model == "torn" and self.calls[model] < 2
        ):  # grpc tries no more once an answer has begun.
            context.send_initial_metadata((("begun", "yes"),))
            context.abort(grpc.StatusCode.UNAVAILABLE, "torn")
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


class FakeRepository(oip_grpc.GRPCInferenceServiceServicer):
    """Knows one model; refuses to load another, and whoever has not the token ``admin``."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str]] = []
        self.level = "info"

    def RepositoryIndex(
        self, request: oip.RepositoryIndexRequest, context: grpc.ServicerContext
    ) -> oip.RepositoryIndexResponse:
        index = oip.RepositoryIndexResponse.ModelIndex
        models = [index(name="fashion-els", version="3", state="READY")]
        if not request.ready:
            models.append(index(name="torn", version="1", state="UNAVAILABLE", reason="no bank"))
        return oip.RepositoryIndexResponse(models=models)

    def RepositoryModelLoad(
        self, request: oip.RepositoryModelLoadRequest, context: grpc.ServicerContext
    ) -> oip.RepositoryModelLoadResponse:
        self._enter(context)
        if request.model_name == "torn":
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "torn: no bank")
        self.done.append(("load", request.model_name))
        return oip.RepositoryModelLoadResponse()

    def RepositoryModelUnload(
        self, request: oip.RepositoryModelUnloadRequest, context: grpc.ServicerContext
    ) -> oip.RepositoryModelUnloadResponse:
        self._enter(context)
        self.done.append(("unload", request.model_name))
        return oip.RepositoryModelUnloadResponse()

    def ModelStatistics(
        self, request: oip.ModelStatisticsRequest, context: grpc.ServicerContext
    ) -> oip.ModelStatisticsResponse:
        inference = oip.InferStatistics(
            success=oip.StatisticDuration(count=5, ns=4_000_000_000),
            fail=oip.StatisticDuration(count=1),
            queue=oip.StatisticDuration(count=5, ns=1_500_000_000),
            compute_infer=oip.StatisticDuration(count=5, ns=2_500_000_000),
        )
        model = oip.ModelStatistics(
            name="fashion-els",
            version="3",
            inference_count=7,
            execution_count=2,
            inference_stats=inference,
        )
        return oip.ModelStatisticsResponse(model_stats=[model])

    def LogSettings(
        self, request: oip.LogSettingsRequest, context: grpc.ServicerContext
    ) -> oip.LogSettingsResponse:
        self._enter(context)
        if "log_level" in request.settings:
            self.level = request.settings["log_level"].string_param
        response = oip.LogSettingsResponse()
        response.settings["log_level"].string_param = self.level
        return response

    def _enter(self, context: grpc.ServicerContext) -> None:
        token = dict(context.invocation_metadata()).get("authorization")
        if token is None:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "a bearer token is needed")
        if token != "Bearer admin":
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "the role admin is needed")


@contextmanager
def served(
    denoiser: FakeDenoiser,
    repository: FakeRepository | None = None,
    *,
    credentials: grpc.ServerCredentials | None = None,
    health_of: health.HealthServicer | None = None,
) -> Iterator[str]:
    """Serve on a free port and yield its address; every connection may ask for health."""
    server = grpc.server(
        futures.ThreadPoolExecutor(8),
        options=[("grpc.http2.min_ping_interval_without_data_ms", 5_000)],
    )
    pb_grpc.add_DenoiserServiceServicer_to_server(denoiser, server)
    # The methods that it lacks answer UNIMPLEMENTED: so says the class that it comes from.
    repository = repository or FakeRepository()  # type: ignore[abstract]
    oip_grpc.add_GRPCInferenceServiceServicer_to_server(repository, server)
    health_pb2_grpc.add_HealthServicer_to_server(
        health_of or health.HealthServicer(experimental_non_blocking=True), server
    )
    if credentials:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    else:
        port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
