"""Open Inference Protocol: server and model metadata, and ``ModelInfer``.

``requests.signatures`` lists the inputs and outputs of a model, ``requests.inference`` decodes
them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from els_proto.inference import grpc_service_pb2 as pb
from els_service.config import Limits
from els_service.denoisers.answers import score_array
from els_service.denoisers.base import Denoised, Query
from els_service.engine.engine import Engine
from els_service.errors import ElsError
from els_service.server.requests.inference import InferenceMethod, priority_of, timeout_s_of
from els_service.server.requests.signatures import FP32, INPUTS, inputs_of, outputs_of
from els_service.server.services.administration import (
    EXTENSIONS,
    Administration,
    OnChange,
    platform_of,
)
from els_service.server.transport.call_context import context_of
from els_service.server.transport.grpc_types import Context, Response
from els_service.version import FULL

_OUTPUTS: dict[str, Callable[[Query, Denoised], npt.NDArray[np.float32]]] = {
    "denoised": lambda query, denoised: denoised.pixels,
    "score": lambda query, denoised: score_array(query, denoised.pixels),
    "log_evidence": lambda query, denoised: _evidence(denoised),
}


class InferenceService(Administration):
    """Base methods of the protocol; the extensions are inherited.

    Args:
        engine: computes.
        limits: of requests.
        ready: whether the server is ready.
        on_change: as of ``Administration``.
    """

    def __init__(
        self, engine: Engine, limits: Limits, ready: Callable[[], bool], on_change: OnChange
    ) -> None:
        super().__init__(engine, limits, on_change)
        self._ready, self._infer = ready, InferenceMethod(engine.models, limits)

    async def ServerLive(
        self, request: pb.ServerLiveRequest, context: Context
    ) -> pb.ServerLiveResponse:
        """Return true while the process runs."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(
        self, request: pb.ServerReadyRequest, context: Context
    ) -> pb.ServerReadyResponse:
        """Return whether the server accepts requests."""
        return pb.ServerReadyResponse(ready=self._ready())

    async def ModelReady(
        self, request: pb.ModelReadyRequest, context: Context
    ) -> pb.ModelReadyResponse:
        """Return whether a model is served; false for an unknown one."""
        try:
            self._engine.models.find(request.name, request.version)
        except ElsError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self._ready())

    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, context: Context
    ) -> pb.ServerMetadataResponse:
        """Return name, version with commit, and extensions of the server."""
        return pb.ServerMetadataResponse(name="els-denoise", version=FULL, extensions=EXTENSIONS)

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        """Return the inputs and outputs of a model."""
        served = self._engine.models.find(request.name, request.version)
        metadata = pb.ModelMetadataResponse.TensorMetadata
        info = served.info
        return pb.ModelMetadataResponse(
            name=request.name,
            versions=[str(served.version)],
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
        served, form, query, checked = self._infer.read(request)
        scheduling = context_of(context, priority_of(request), timeout_s_of(request))
        denoised = self._engine.denoise(served, query, scheduling, checked=checked)
        if not isinstance(denoised, Denoised):
            denoised = await denoised
        contents = [_OUTPUTS[output](query, denoised) for output in form.outputs]
        return form.write(request.id.encode(), contents)


def _evidence(denoised: Denoised) -> npt.NDArray[np.float32]:
    if denoised.log_evidence is None:
        raise RuntimeError("log_evidence: expected an array from this model, got None")
    return denoised.log_evidence
