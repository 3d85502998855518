"""A fake server that also has a model of kind picture, ``street``, and draws from it."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import numpy as np
from tests.support.fake_answers import explanation, tensor
from tests.support.fake_server import MODELS, FakeDenoiser

from els_proto.denoise.v1 import denoise_pb2 as pb

STREET = pb.Model(
    name="street",
    kind="picture",
    channels=3,
    height=8,
    width=12,
    scales=[pb.Scale(height=4, width=6), pb.Scale(height=8, width=12)],
    scale_steps=3,
    has_sources=True,
    sizes=pb.Sizes(min_height=3, max_height=128, min_width=3, max_width=128),
    limits=pb.Limits(max_images=4, max_steps=40, max_pixels=100_000, priority_levels=4),
)
PART = pb.Model()
"""The same model without sources, as with a part of its patches."""
PART.CopyFrom(STREET)
PART.name, PART.has_sources = "part", False


class FakePictures(FakeDenoiser):
    """Draws pictures whose pixels rise to 1, each scale at its size; says where they came from."""

    def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.ServicerContext
    ) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[*MODELS.values(), STREET])

    def GetModel(
        self, request: pb.GetModelRequest, context: grpc.ServicerContext
    ) -> pb.GetModelResponse:
        known = {**MODELS, STREET.name: STREET, "photo": STREET, PART.name: PART}
        if request.name in known:
            return pb.GetModelResponse(model=known[request.name])
        return super().GetModel(request, context)

    def Sample(
        self, request: pb.SampleRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.SampleResponse]:
        self._enter(request, request.model, context)
        steps, scales = request.steps or STREET.scale_steps, len(STREET.scales)
        for index in range(1, steps * scales + 1):
            scale, last = (index - 1) // steps, index == steps * scales
            small = STREET.scales[scale]
            height = request.height * small.height // STREET.height
            width = request.width * small.width // STREET.width
            x = tensor(np.full((request.count, 3, height, width), index / (steps * scales)))
            yield pb.SampleResponse(
                index=index,
                total=steps * scales,
                x=x if request.return_x or last else None,
                denoised=x if request.return_denoised or last else None,
                scale=scale,
                scales=scales,
            )

    def Explain(
        self, request: pb.ExplainRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ExplainResponse]:
        self._enter(request, request.model, context)
        for index in range(request.x.shape[0]):
            # The photograph at its finest scale.
            shape = (1, *request.x.shape[1:])
            answer = explanation(1, shape, request.top, request.return_images)
            answer.index = index
            yield answer
