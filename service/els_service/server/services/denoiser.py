"""Service ``denoise.v1.DenoiserService``: reads requests, asks the engine, writes answers."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Awaitable
from functools import partial

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.config import Limits
from els_service.denoisers.base import Denoised, DenoiserInfo, one_each, score_array
from els_service.denoisers.noise import seeded_noise
from els_service.denoisers.samplers import (
    SAMPLERS,
    Options,
    Step,
    check_options,
    evaluations_of,
    steps_of,
)
from els_service.engine.engine import Engine, SamplingRun
from els_service.engine.registry import ModelVersion
from els_service.errors import (
    InvalidArgumentError,
    QueueFullError,
    ResourceExhaustedError,
    UnavailableError,
)
from els_service.server.requests import tensors
from els_service.server.requests.denoise import DenoiseForm, DenoiseMethod
from els_service.server.requests.resume_token import decode_token, encode_token
from els_service.server.services.explain import MomentService
from els_service.server.services.streams import Window, in_order
from els_service.server.transport.caller import caller_of
from els_service.server.transport.interceptor import Answer, Context, check_message
from els_service.server.transport.request_context import context_of
from els_service.server.transport.tcp_info import shut_down

_SAMPLERS: dict[int, str] = {
    pb.SAMPLER_UNSPECIFIED: "ddim",
    pb.SAMPLER_DDIM: "ddim",
    pb.SAMPLER_DDIM_RELEASED: "ddim_released",
    pb.SAMPLER_DDPM: "ddpm",
    pb.SAMPLER_HEUN: "heun",
}


class DenoiserService(MomentService):
    """Our own contract."""

    def __init__(self, engine: Engine, limits: Limits, draining: asyncio.Event) -> None:
        super().__init__(engine, limits)
        self._engine, self._limits, self._draining = engine, limits, draining
        models = engine.models
        self._denoise = DenoiseMethod(models, limits, pb.DenoiseResponse, "denoised")
        self._score = DenoiseMethod(models, limits, pb.ScoreResponse, "score")
        self._stream = DenoiseMethod(
            models, limits, pb.DenoiseStreamResponse, "response", "denoised"
        )

    async def Denoise(self, request: pb.DenoiseRequest, context: Context) -> Answer:
        """Return the expected clean images."""
        entry, form, query, checked = self._denoise.read(request)
        terms = context_of(context, request.priority, request.timeout_s)
        answer = self._engine.denoise(entry, query, terms, checked=checked)
        if not isinstance(answer, Denoised):
            answer = await answer
        return self._denoise.write(form, answer.pixels, answer)

    async def Score(self, request: pb.ScoreRequest, context: Context) -> Answer:
        """Return the scores."""
        entry, form, query, checked = self._score.read(request)
        terms = context_of(context, request.priority, request.timeout_s)
        answer = self._engine.denoise(entry, query, terms, checked=checked)
        if not isinstance(answer, Denoised):
            answer = await answer
        return self._score.write(form, score_array(query, answer.pixels), answer)

    def DenoiseStream(
        self, requests: AsyncIterator[pb.DenoiseRequest], context: Context
    ) -> AsyncIterator[Answer]:
        """Return the answers in the order of their requests."""
        disconnect = partial(shut_down, context.peer())
        window = Window(self._engine.memory, caller_of(context), disconnect)
        return in_order(requests, partial(self._begin, context), self._draining, window)

    def _begin(self, context: Context, request: pb.DenoiseRequest) -> Answer | Awaitable[Answer]:
        """Return the answer to one request of a stream, or the answer to come."""
        check_message(request)
        entry, form, query, checked = self._stream.read(request)
        terms = context_of(context, request.priority, request.timeout_s)
        answer = self._engine.denoise(entry, query, terms, checked=checked)
        if isinstance(answer, Denoised):
            return self._stream.write(form, answer.pixels, answer)
        return self._later(form, answer)

    async def _later(self, form: DenoiseForm, answer: Awaitable[Denoised]) -> bytes:
        denoised = await answer
        return self._stream.write(form, denoised.pixels, denoised)

    async def Sample(
        self, request: pb.SampleRequest, context: Context
    ) -> AsyncIterator[pb.SampleResponse]:
        """Yield the steps of a trajectory."""
        entry = self._engine.models.entry(request.model, request.version)
        info, count = entry.info, request.count or 1
        self._check_sample(request, info, count)
        name = _SAMPLERS[request.sampler]
        options = Options(
            steps=request.steps,
            schedule=info.levels,
            eta=request.eta if request.HasField("eta") else 1.0,
            churn=request.churn,
        )
        check_options(name, options)
        noise = seeded_noise(request.seed, count, info.shape)
        shape = (count, *info.shape)
        resume = decode_token(request, entry, shape, steps_of(name, options))
        run = SamplingRun(
            SAMPLERS[name](noise, options, resume),
            one_each("labels", request.labels, count, none=-1),
            one_each("windows", tensors.decode_windows(request.windows), count, none=0),
            evaluations_of(name, options, resume),
            tensors.decode_conditions(request, info, count),
            request.return_decoded,
        )
        terms = context_of(context, request.priority)
        steps = self._engine.sample(request.model, run, terms, version=request.version)
        taken: Step | None = None
        try:
            async with contextlib.aclosing(steps):
                async for step in steps:
                    taken = step
                    message = _encode_step(step, request)
                    if step.index == 1 and request.return_noise:
                        start = await asyncio.to_thread(noise, 0)
                        encoded = tensors.encode_tensor(start.float(), request.output_dtype)
                        message.noise.CopyFrom(encoded)
                    if request.return_resume_token and step.index < step.total:
                        message.resume_token = _token(request, entry, step)
                    yield message
        except (UnavailableError, QueueFullError):
            if token := _token(request, entry, taken):
                yield pb.SampleResponse(resume_token=token)
            raise

    def _check_sample(self, request: pb.SampleRequest, info: DenoiserInfo, count: int) -> None:
        limits = self._limits
        tensors.bounded("labels", request.labels, limits)
        tensors.bounded("windows", request.windows, limits)
        if count < 1:
            raise InvalidArgumentError("count", "at least 1", count)
        if count > limits.max_images:
            raise ResourceExhaustedError("count", f"at most {limits.max_images}", count)
        pixels = count * math.prod(info.shape)
        tensors.check_pixels("count", pixels, limits)
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
        size = (2 + request.return_noise) * pixels * tensors.output_size(request.output_dtype)
        if request.return_resume_token:
            size += 8 * pixels
        if request.return_decoded:
            if info.decoded_shape is None:
                raise InvalidArgumentError("return_decoded", "false for this model", "true")
            decoded = count * math.prod(info.decoded_shape)
            tensors.check_pixels("count", decoded, limits)
            size += decoded * tensors.output_size(request.output_dtype)
        tensors.check_answer_size("count", size, limits)

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        """Return the newest version of every model that answers."""
        return pb.ListModelsResponse(
            models=[
                tensors.encode_model(entry, self._limits) for entry in self._engine.models.newest()
            ]
        )

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        """Return one model's description."""
        entry = self._engine.models.entry(request.name, request.version)
        return pb.GetModelResponse(model=tensors.encode_model(entry, self._limits))


def _token(request: pb.SampleRequest, entry: ModelVersion, taken: Step | None) -> bytes:
    """Return where a trajectory goes on after a step; where it began, if none was taken."""
    if taken is None:
        return request.resume_token
    return encode_token(request, entry, taken.index, taken.state)


def _encode_step(step: Step, request: pb.SampleRequest) -> pb.SampleResponse:
    last = step.index == step.total
    return pb.SampleResponse(
        index=step.index,
        total=step.total,
        x=tensors.encode_tensor(step.x.float(), request.output_dtype)
        if request.return_x or last
        else None,
        denoised=tensors.encode_tensor(step.denoised.float(), request.output_dtype)
        if request.return_denoised or last
        else None,
        alpha_bar=step.alpha_bar,
        decoded=None
        if step.decoded is None
        else tensors.encode_tensor(step.decoded, request.output_dtype),
    )
