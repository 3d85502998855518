"""Method ``Originality`` of ``denoise.v1.DenoiserService``, and the reports of ``Sample``."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import numpy as np

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.denoisers.base import one_each
from els_service.denoisers.originality import Originality
from els_service.denoisers.samplers import Step
from els_service.engine.model_versions import ModelVersion
from els_service.engine.request_context import RequestContext
from els_service.errors import InvalidArgumentError
from els_service.server.requests.originality import (
    DEFAULT_NEAREST,
    Wanted,
    check_bank,
    check_reported,
    held_report,
    read_originality,
    report_query,
    report_size,
    write_originality,
)
from els_service.server.requests.sample import count_of, image_shape_of
from els_service.server.requests.tensors import check_answer_size
from els_service.server.services.explain import MomentService
from els_service.server.transport.call_context import context_of
from els_service.server.transport.grpc_types import Context


class OriginalityService(MomentService):
    """Methods that compare images with a bank."""

    async def Originality(
        self, request: pb.OriginalityRequest, context: Context
    ) -> AsyncIterator[pb.OriginalityResponse]:
        """Yield the report of each image; between two of them nothing is queued."""
        served = self._engine.models.find(request.model, request.version)
        check_bank(served, self._engine.models)
        query, nearest = read_originality(request, served.info, self._limits)
        scheduling = context_of(context, request.priority, request.timeout_s)
        size = held_report(served.info, query.pixels.shape[1:])
        answers = self._engine.derive_each(served, "originality", query, size, scheduling)
        index = 0
        async with contextlib.aclosing(answers):
            async for found in answers:
                assert isinstance(found, Originality)
                yield write_originality(index, found, nearest)
                index += 1

    async def _wanted_reports(
        self, request: pb.SampleRequest, served: ModelVersion, scheduling: RequestContext
    ) -> Wanted | None:
        """Return the reports that a request asks for; None for none.

        All that may be wrong about them is checked before the first step.
        """
        if not request.return_originality:
            if request.originality_model:
                expected = "unset without return_originality"
                raise InvalidArgumentError("originality_model", expected, "it")
            return None
        field = "originality_model" if request.originality_model else "return_originality"
        models, name = self._engine.models, request.originality_model or served.model
        other = models.find(name) if request.originality_model else served
        check_bank(other, models, field)
        if other.loaded is None:
            other = await self._engine.find_loaded(name, "", scheduling)
        info, count = other.info, count_of(request)
        shape = image_shape_of(request, served.info)
        check_reported(request, served.info, shape, info)
        size = count * report_size(DEFAULT_NEAREST, info)
        check_answer_size("return_originality", size, self._limits)
        same = info.label_count == served.info.label_count
        labels = one_each("labels", request.labels if same else (), count, none=-1)
        if other.loaded is not None:
            blank = report_query(np.zeros((count, *shape), np.float32), labels, info)
            other.loaded.derived["originality"].denoiser.check(blank)
        return Wanted(other, labels)

    async def _reports(
        self, step: Step, wanted: Wanted, scheduling: RequestContext
    ) -> list[pb.OriginalityResponse]:
        """Return the report of each image of the last step."""
        query = report_query(step.x.float().numpy(), wanted.labels, wanted.served.info)
        size = held_report(wanted.served.info, query.pixels.shape[1:])
        found: list[pb.OriginalityResponse] = []
        answers = self._engine.derive_each(wanted.served, "originality", query, size, scheduling)
        async with contextlib.aclosing(answers):
            async for answer in answers:
                assert isinstance(answer, Originality)
                found.append(write_originality(len(found), answer, DEFAULT_NEAREST))
        return found
