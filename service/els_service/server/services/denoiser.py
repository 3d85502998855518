"""Service ``denoise.v1.DenoiserService``: decodes requests, calls the engine, encodes responses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from dataclasses import replace
from functools import partial

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.config import Limits
from els_service.denoisers.answers import score_array
from els_service.denoisers.base import Denoised, Query, one_each
from els_service.denoisers.noise import seeded_noise
from els_service.denoisers.samplers import (
    ALL_SAMPLERS,
    Step,
    evaluations_of,
    state_shape,
    steps_of,
)
from els_service.engine.derived import partial_of
from els_service.engine.engine import Engine
from els_service.engine.model_versions import ModelVersion
from els_service.engine.request_context import RequestContext
from els_service.engine.sampling import SamplingRun
from els_service.errors import InvalidArgumentError, QueueFullError, UnavailableError
from els_service.server.requests import tensors
from els_service.server.requests.conditioning import decode_conditions, decode_guidance
from els_service.server.requests.denoise import DenoiseForm, DenoiseMethod
from els_service.server.requests.model_descriptions import encode_model
from els_service.server.requests.pyramid import expected_queries
from els_service.server.requests.resume_token import decode_token, encode_token
from els_service.server.requests.sample import (
    SAMPLER_NAMES,
    check_sample,
    count_of,
    held_bytes_of,
    image_shape_of,
    options_of,
)
from els_service.server.services.explain import written
from els_service.server.services.originality import OriginalityService
from els_service.server.services.streams import Window, in_order
from els_service.server.transport.call_context import caller_of, context_of
from els_service.server.transport.grpc_types import Context, Response
from els_service.server.transport.receiving import check_message
from els_service.server.transport.tcp_info import shut_down


class DenoiserService(OriginalityService):
    """Methods of ``denoise.v1``.

    Args:
        engine: computes.
        limits: of requests.
        draining: set to end streams.
    """

    def __init__(self, engine: Engine, limits: Limits, draining: asyncio.Event) -> None:
        super().__init__(engine, limits)
        self._engine, self._limits, self._draining = engine, limits, draining
        models = engine.models
        self._denoise = DenoiseMethod(models, limits, pb.DenoiseResponse, "denoised")
        self._score = DenoiseMethod(models, limits, pb.ScoreResponse, "score")
        self._stream = DenoiseMethod(
            models, limits, pb.DenoiseStreamResponse, "response", "denoised"
        )

    async def Denoise(self, request: pb.DenoiseRequest, context: Context) -> Response:
        """Return the expected clean images."""
        served, form, query, checked = self._denoise.read(request)
        scheduling = context_of(context, request.priority, request.timeout_s)
        if request.allow_partial:
            return await self._in_part(self._denoise, request, served, form, query, scheduling)
        if request.return_variance:
            return await self._with_variance(self._denoise, served, form, query, scheduling)
        denoised = self._engine.denoise(served, query, scheduling, checked=checked)
        if not isinstance(denoised, Denoised):
            denoised = await denoised
        return self._denoise.write(form, denoised.pixels, denoised)

    async def Score(self, request: pb.ScoreRequest, context: Context) -> Response:
        """Return the scores."""
        served, form, query, checked = self._score.read(request)
        scheduling = context_of(context, request.priority, request.timeout_s)
        denoised = self._engine.denoise(served, query, scheduling, checked=checked)
        if not isinstance(denoised, Denoised):
            denoised = await denoised
        return self._score.write(form, score_array(query, denoised.pixels), denoised)

    def DenoiseStream(
        self, requests: AsyncIterator[pb.DenoiseRequest], context: Context
    ) -> AsyncIterator[Response]:
        """Return the responses in the order of their requests."""
        disconnect = partial(shut_down, context.peer())
        window = Window(self._engine.memory, caller_of(context), disconnect)
        return in_order(requests, partial(self._begin, context), self._draining, window)

    def _begin(
        self, context: Context, request: pb.DenoiseRequest
    ) -> Response | Awaitable[Response]:
        """Return the response to one request of a stream, or an awaitable of it."""
        check_message(request)
        served, form, query, checked = self._stream.read(request)
        scheduling = context_of(context, request.priority, request.timeout_s)
        if request.allow_partial:
            return self._in_part(self._stream, request, served, form, query, scheduling)
        if request.return_variance:
            return self._with_variance(self._stream, served, form, query, scheduling)
        denoised = self._engine.denoise(served, query, scheduling, checked=checked)
        if isinstance(denoised, Denoised):
            return self._stream.write(form, denoised.pixels, denoised)
        return self._write_later(form, denoised)

    async def _in_part(
        self,
        method: DenoiseMethod,
        request: pb.DenoiseRequest,
        served: ModelVersion,
        form: DenoiseForm,
        query: Query,
        scheduling: RequestContext,
    ) -> bytes:
        """Return the response of the shards that are there, with the share of each image."""
        if request.return_variance:
            raise InvalidArgumentError("allow_partial", "false with return_variance", "true")
        loaded = served.loaded
        if loaded is not None and "partial" in loaded.derived:
            answer = await self._engine.derive(served, "partial", query, scheduling)
            denoised, shares = partial_of(answer)
        else:
            pending = self._engine.denoise(served, query, scheduling)
            denoised = pending if isinstance(pending, Denoised) else await pending
            shares = [1.0] * len(query)
        return method.write(form, denoised.pixels, denoised, shares=shares)

    async def _write_later(self, form: DenoiseForm, pending: Awaitable[Denoised]) -> bytes:
        denoised = await pending
        return self._stream.write(form, denoised.pixels, denoised)

    async def Sample(
        self, request: pb.SampleRequest, context: Context
    ) -> AsyncIterator[pb.SampleResponse]:
        """Yield the steps of a trajectory."""
        served = self._engine.models.find(request.model, request.version)
        check_sample(request, served.info, self._limits)
        scheduling = context_of(context, request.priority)
        if served.loaded is None:
            # Its files may have changed: the token is checked by the model that answers. The name
            # is taken now, as the connection may be closed when the model is loaded.
            scheduling = replace(scheduling, caller=scheduling.name())
            served = await self._engine.find_loaded(request.model, request.version, scheduling)
            check_sample(request, served.info, self._limits)
        wanted = await self._wanted_reports(request, served, scheduling)
        # A copy: a reload must not change what the tokens of this trajectory are bound to.
        served = replace(served)
        info, count, name = served.info, count_of(request), SAMPLER_NAMES[request.sampler]
        options = options_of(request, info, self._limits)
        image = image_shape_of(request, info)
        noise = seeded_noise(request.seed, count, image, request.first_image)
        shape = state_shape(name, (count, *image), options)
        resume = decode_token(request, served, shape, steps_of(name, options))
        run = SamplingRun(
            ALL_SAMPLERS[name](noise, options, resume),
            one_each("labels", request.labels, count, none=-1),
            one_each("windows", tensors.decode_windows(request.windows), count, none=0),
            evaluations_of(name, options, resume),
            decode_conditions(request, info, count),
            request.return_decoded,
            decode_guidance(request, count),
            held_bytes_of(name, options, shape),
            image,
            window_scale=request.window_scale or 1.0,
            expected=expected_queries(options, info.shape[0], count),
        )
        total, resumed = steps_of(name, options), resume.index if resume else 0
        run, detail = self._explaining(run, request, served, resumed, total)
        steps = self._engine.sample(request.model, run, scheduling, version=request.version)
        taken: Step | None = None
        try:
            async with contextlib.aclosing(steps):
                async for step in steps:
                    reports: list[pb.OriginalityResponse] = []
                    if wanted is not None and step.index == step.total:
                        # Before the step counts as taken: if it fails, it can be resumed.
                        reports = await self._reports(step, wanted, scheduling)
                    taken = step
                    message = _encode_step(step, request)
                    if step.index == 1 and request.return_noise:
                        start = await asyncio.to_thread(noise, 0)
                        encoded = tensors.encode_tensor(start.float(), request.output_dtype)
                        message.noise.CopyFrom(encoded)
                    message.originality.extend(reports)
                    for index, found in enumerate(step.explanations):
                        message.explanations.append(await written(index, found, detail, info))
                    if request.return_resume_token and step.index < step.total:
                        message.resume_token = _token(request, served, step)
                    yield message
        except (UnavailableError, QueueFullError):
            if token := _token(request, served, taken):
                yield pb.SampleResponse(resume_token=token)
            raise

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        """Return a description of the newest version of each served model."""
        return pb.ListModelsResponse(
            models=[encode_model(served, self._limits) for served in self._engine.models.newest()]
        )

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        """Return the description of one model."""
        served = self._engine.models.find(request.name, request.version)
        return pb.GetModelResponse(model=encode_model(served, self._limits))


def _token(request: pb.SampleRequest, served: ModelVersion, taken: Step | None) -> bytes:
    """Return the resume token after a step; before the first, that of the request."""
    if taken is None:
        return request.resume_token
    return encode_token(request, served, taken.index, taken.state)


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
        scale=step.scale,
        scales=step.scales,
        decoded=None
        if step.decoded is None
        else tensors.encode_tensor(step.decoded, request.output_dtype),
    )
