"""``denoise.v1.DenoiserService``: decode, ask the engine, encode."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceServicer
from els_service.config import Limits
from els_service.denoisers.base import Denoised, DenoiserInfo, Query, one_each, score
from els_service.denoisers.levels import SCHEDULES
from els_service.denoisers.noise import seeded_noise
from els_service.denoisers.samplers import SAMPLERS, Options, Step, check_options
from els_service.engine.engine import Engine
from els_service.errors import InvalidArgumentError, ResourceExhaustedError
from els_service.wire import codec
from els_service.wire.calls import Context, deadline_of

_SAMPLERS: dict[int, str] = {
    pb.SAMPLER_UNSPECIFIED: "ddim",
    pb.SAMPLER_DDIM: "ddim",
    pb.SAMPLER_DDIM_RELEASED: "ddim_released",
    pb.SAMPLER_DDPM: "ddpm",
    pb.SAMPLER_HEUN: "heun",
}


class DenoiserService(DenoiserServiceServicer):
    """Our own contract."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self._engine, self._limits = engine, limits

    async def Denoise(self, request: pb.DenoiseRequest, context: Context) -> pb.DenoiseResponse:
        """Return the expected clean images."""
        _, answer = await self._answer(request, context)
        return pb.DenoiseResponse(
            denoised=codec.encode_tensor(answer.pixels, request.output_dtype),
            log_evidence=codec.encode_evidence(answer, request.return_log_evidence),
        )

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        """Return the scores."""
        query, answer = await self._answer(request, context)
        return pb.ScoreResponse(
            score=codec.encode_tensor(score(query, answer.mean), request.output_dtype),
            log_evidence=codec.encode_evidence(answer, request.return_log_evidence),
        )

    async def _answer(self, request: codec.Request, context: Context) -> tuple[Query, Denoised]:
        info = self._engine.denoiser(request.model).info
        query = codec.decode_query(request, info, self._limits)
        return query, await self._engine.denoise(request.model, query, deadline_of(context))

    async def Sample(
        self, request: pb.SampleRequest, context: Context
    ) -> AsyncIterator[pb.SampleResponse]:
        """Yield the steps of a trajectory."""
        info = self._engine.denoiser(request.model).info
        count = request.count or 1
        self._check_sample(request, info, count)
        name = _SAMPLERS[request.sampler]
        options = Options(
            steps=request.steps,
            schedule=SCHEDULES[info.schedule],
            eta=request.eta if request.HasField("eta") else 1.0,
            churn=request.churn,
        )
        check_options(name, options)
        noise = seeded_noise(request.seed, count, info.shape)
        steps = self._engine.sample(
            request.model,
            SAMPLERS[name](noise, options),
            one_each("labels", request.labels, count, none=-1),
            one_each("windows", codec.decode_windows(request.windows), count, none=0),
            deadline_of(context),
        )
        async for step in steps:
            message = _encode_step(step, request)
            if step.index == 1 and request.return_noise:
                start = await asyncio.to_thread(noise, 0)
                message.noise.CopyFrom(codec.encode_tensor(start.float(), request.output_dtype))
            yield message

    def _check_sample(self, request: pb.SampleRequest, info: DenoiserInfo, count: int) -> None:
        limits = self._limits
        if count < 1:
            raise InvalidArgumentError("count", "at least 1", count)
        if count > limits.max_images:
            raise ResourceExhaustedError("count", f"at most {limits.max_images}", count)
        pixels = count * math.prod(info.shape)
        codec.check_pixels("count", pixels, limits)
        if request.steps < 1:
            raise InvalidArgumentError("steps", "at least 1", request.steps)
        if request.steps > limits.max_steps:
            raise ResourceExhaustedError("steps", f"at most {limits.max_steps}", request.steps)
        if request.sampler not in _SAMPLERS:
            raise InvalidArgumentError("sampler", "a known sampler", request.sampler)
        if request.eta and request.sampler != pb.SAMPLER_DDPM:
            raise InvalidArgumentError("eta", "0 or unset but for SAMPLER_DDPM", request.eta)
        if request.churn and request.sampler != pb.SAMPLER_HEUN:
            raise InvalidArgumentError("churn", "0 but for SAMPLER_HEUN", request.churn)
        size = (2 + request.return_noise) * pixels * codec.output_size(request.output_dtype)
        codec.check_answer_size("count", size, limits)

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        """Return every model that answers."""
        models = self._engine.models.items()
        return pb.ListModelsResponse(
            models=[
                codec.encode_model(name, denoiser.info, self._limits) for name, denoiser in models
            ]
        )

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        """Return one model's description."""
        info = self._engine.denoiser(request.name).info
        return pb.GetModelResponse(model=codec.encode_model(request.name, info, self._limits))


def _encode_step(step: Step, request: pb.SampleRequest) -> pb.SampleResponse:
    last = step.index == step.total
    return pb.SampleResponse(
        index=step.index,
        total=step.total,
        x=codec.encode_tensor(step.x.float(), request.output_dtype)
        if request.return_x or last
        else None,
        denoised=codec.encode_tensor(step.denoised.float(), request.output_dtype)
        if request.return_denoised or last
        else None,
        alpha_bar=step.alpha_bar,
    )
