"""Methods ``Vjp``, ``Jvp`` and ``Explain`` of ``denoise.v1.DenoiserService``."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceServicer
from els_service.config import Limits
from els_service.denoisers.base import Denoised, DenoiserInfo, Query
from els_service.denoisers.explanations import Explanation
from els_service.denoisers.gradients import Direction, Product
from els_service.engine.derived import (
    AGAIN,
    evidence_of,
    product_of,
    with_direction,
    with_evidence,
)
from els_service.engine.engine import Engine
from els_service.engine.model_versions import ModelVersion
from els_service.engine.request_context import RequestContext
from els_service.engine.sampling import SamplingRun
from els_service.errors import InvalidArgumentError, UnsupportedError
from els_service.server.requests import gradients, tensors
from els_service.server.requests.denoise import DenoiseForm, DenoiseMethod
from els_service.server.requests.evidence import EvidenceSeal
from els_service.server.requests.explanations import (
    Detail,
    check_sources,
    held_explanation,
    read_explain,
    read_explained_steps,
    write_explanation,
)
from els_service.server.requests.pyramid import border_of
from els_service.server.transport.call_context import context_of
from els_service.server.transport.grpc_types import Context


class MomentService(DenoiserServiceServicer):
    """Methods that return more of a posterior than its mean.

    Args:
        engine: answers the queries.
        limits: of requests and answers.
    """

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self._engine, self._limits = engine, limits
        self._seal = EvidenceSeal()

    async def Vjp(self, request: pb.VjpRequest, context: Context) -> pb.VjpResponse:
        """Return D(x) and Jᵀg."""
        answer, evidence = await self._product(
            request, request.cotangent, "cotangent", "vjp", context
        )
        response, dtype = pb.VjpResponse(evidence=evidence), request.output_dtype
        tensors.write_tensor(response.denoised, answer.mean, dtype)
        tensors.write_tensor(response.vjp, answer.product, dtype)
        return response

    async def Jvp(self, request: pb.JvpRequest, context: Context) -> pb.JvpResponse:
        """Return D(x) and J u."""
        answer, evidence = await self._product(request, request.tangent, "tangent", "jvp", context)
        response, dtype = pb.JvpResponse(evidence=evidence), request.output_dtype
        tensors.write_tensor(response.denoised, answer.mean, dtype)
        tensors.write_tensor(response.jvp, answer.product, dtype)
        return response

    async def Explain(
        self, request: pb.ExplainRequest, context: Context
    ) -> AsyncIterator[pb.ExplainResponse]:
        """Yield the explanation of each image; between two of them nothing is queued."""
        served = self._engine.models.find(request.model, request.version)
        check_sources(served, self._engine.models)
        query, detail = read_explain(request, served.info, self._limits)
        scheduling = context_of(context, request.priority, request.timeout_s)
        size = held_explanation(served.info, query.pixels.shape[1:])
        answers = self._engine.derive_each(served, "explain", query, size, scheduling)
        index = 0
        async with contextlib.aclosing(answers):
            async for found in answers:
                assert isinstance(found, Explanation)
                yield await written(index, found, detail, served.info)
                index += 1

    def _explaining(
        self,
        run: SamplingRun,
        request: pb.SampleRequest,
        served: ModelVersion,
        resumed: int,
        total: int,
    ) -> tuple[SamplingRun, Detail]:
        """Return a trajectory that explains what its request asks for, and how.

        Args:
            run: trajectory of the request.
            request: of ``Sample``.
            served: its model.
            resumed: steps that were taken before.
            total: steps in all.
        """
        steps, detail = read_explained_steps(request, self._limits)
        if not steps:
            return run, detail
        check_sources(served, self._engine.models, "explain_steps")
        if max(steps) > total:
            expected = f"at most {total}, the number of steps"
            raise InvalidArgumentError("explain_steps", expected, max(steps))
        left = frozenset(step for step in steps if step > resumed)
        channels, height, width = run.shape or served.info.shape
        border = 2 * border_of(request, served.info)
        each = held_explanation(served.info, (channels, height + border, width + border))
        held = run.held_bytes + len(run.labels) * each
        return replace(run, explain_steps=left, held_bytes=held), detail

    async def _with_variance(
        self,
        method: DenoiseMethod,
        served: ModelVersion,
        form: DenoiseForm,
        query: Query,
        scheduling: RequestContext,
    ) -> bytes:
        """Return the response with the posterior variance, which is queued beside D(x).

        D(x) is computed as without it, so that it has the same bits.
        """
        check_sources(served, self._engine.models, "return_variance")
        size = tensors.answer_size(form.shape, form.output_dtype, form.log_evidence)
        size += 4 * math.prod(form.shape)
        tensors.check_answer_size("return_variance", size, self._limits)
        denoised = self._engine.denoise(served, query, scheduling)
        second = self._engine.derive(served, "variance", query, scheduling)
        pending: list[asyncio.Future[Denoised]] = [asyncio.ensure_future(second)]
        if not isinstance(denoised, Denoised):
            pending.append(denoised)
        try:
            variance, *first = await asyncio.gather(*pending)
        finally:
            # Without effect on those that are done: the other one of a failed pair.
            for future in pending:
                future.cancel()
        answer = denoised if isinstance(denoised, Denoised) else first[0]
        return method.write(form, answer.pixels, answer, variance.pixels)

    async def _product(
        self,
        request: gradients.ProductRequest,
        direction: pb.Tensor,
        field: str,
        kind: Direction,
        context: Context,
    ) -> tuple[Product, bytes]:
        """Return the product, and the evidence that the request asks for and did not have."""
        served = self._engine.models.find(request.model, request.version)
        if not served.info.has_gradients:
            raise UnsupportedError(
                f"{served.model} has no gradients: a model of kind {served.info.kind} cannot be "
                "differentiated"
            )
        query, along = gradients.read_product(request, direction, field, served.info, self._limits)
        scheduling = context_of(context, request.priority, request.timeout_s)
        packed = with_direction(query, along)
        if served.info.reuses_evidence and (request.evidence or request.return_evidence):
            evidence, fresh = await self._evidence(request, served, query, scheduling)
            packed = with_evidence(packed, evidence)
            answer = await self._engine.derive(served, AGAIN[kind], packed, scheduling)
            return product_of(answer), fresh
        return product_of(await self._engine.derive(served, kind, packed, scheduling)), b""

    async def _evidence(
        self,
        request: gradients.ProductRequest,
        served: ModelVersion,
        query: Query,
        scheduling: RequestContext,
    ) -> tuple[npt.NDArray[np.float64], bytes]:
        """Return the evidence of a query, and the bytes to return if it had to be computed."""
        if request.evidence:
            verified = self._seal.verified
            known = await asyncio.to_thread(verified, served, query, request.evidence)
            if known is not None:
                return known, b""
        found = evidence_of(await self._engine.derive(served, "evidence", query, scheduling))
        if not request.return_evidence:
            return found, b""
        return found, await asyncio.to_thread(self._seal.signed, served, query, found)


async def written(
    index: int, found: Explanation, detail: Detail, info: DenoiserInfo
) -> pb.ExplainResponse:
    """Return ``write_explanation``, which sorts the shares of a whole bank, from another thread."""
    return await asyncio.to_thread(write_explanation, index, found, detail, info)
