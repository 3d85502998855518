"""Open Inference Protocol: server and model metadata, and ``ModelInfer``.

``signatures`` lists the inputs and outputs of a model, ``requests.inference`` reads them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from els_proto.inference import grpc_service_pb2 as pb
from els_service.config import Limits
from els_service.denoisers.base import Denoised, Query, score_array
from els_service.engine.engine import Engine
from els_service.errors import ElsError
from els_service.server.requests.inference import InferenceMethod, priority_of, timeout_s_of
from els_service.server.requests.signatures import FP32, INPUTS, inputs_of, outputs_of
from els_service.server.services.administration import (
    EXTENSIONS,
    Administration,
    Changed,
    platform_of,
)
from els_service.server.transport.grpc_types import Context, Response
from els_service.server.transport.request_context import context_of
from els_service.version import FULL

_OUTPUTS: dict[str, Callable[[Query, Denoised], npt.NDArray[np.float32]]] = {
    "denoised": lambda query, answer: answer.pixels,
    "score": lambda query, answer: score_array(query, answer.pixels),
    "log_evidence": lambda query, answer: _evidence(answer),
}


class InferenceService(Administration):
    """The base methods of the protocol; the extensions are inherited."""

    def __init__(
        self, engine: Engine, limits: Limits, ready: Callable[[], bool], changed: Changed
    ) -> None:
        super().__init__(engine, limits, changed)
        self._ready, self._infer = ready, InferenceMethod(engine.models, limits)

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

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> Response:
        """Return the requested outputs, as raw contents."""
        entry, form, query, checked = self._infer.read(request)
        terms = context_of(context, priority_of(request), timeout_s_of(request))
        answer = self._engine.denoise(entry, query, terms, checked=checked)
        if not isinstance(answer, Denoised):
            answer = await answer
        contents = [_OUTPUTS[output](query, answer) for output in form.outputs]
        return form.write(request.id.encode(), contents)


def _evidence(answer: Denoised) -> npt.NDArray[np.float32]:
    if answer.log_evidence is None:
        raise RuntimeError("the model promised log_evidence and has none")
    return answer.log_evidence
