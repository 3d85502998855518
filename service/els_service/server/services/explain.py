"""Methods ``Vjp``, ``Jvp`` and ``Explain`` of ``denoise.v1.DenoiserService``."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from els_kernels import MAX_SOURCES
from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceServicer
from els_service.config import Limits
from els_service.denoisers.explanations import Explanation
from els_service.denoisers.gradients import Direction, Product
from els_service.engine.derived import product_of, with_direction
from els_service.engine.engine import Engine
from els_service.errors import UnsupportedError
from els_service.server.requests import gradients, tensors
from els_service.server.transport.grpc_types import Context
from els_service.server.transport.request_context import context_of

_LISTED = 20
"""Models that an error lists."""


class MomentService(DenoiserServiceServicer):
    """Methods that return more of a posterior than its mean.

    Args:
        engine: answers the queries.
        limits: of requests and answers.
    """

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self._engine, self._limits = engine, limits

    async def Vjp(self, request: pb.VjpRequest, context: Context) -> pb.VjpResponse:
        """Return D(x) and Jᵀg."""
        answer = await self._product(request, request.cotangent, "cotangent", "vjp", context)
        response, dtype = pb.VjpResponse(), request.output_dtype
        tensors.write_tensor(response.denoised, answer.mean, dtype)
        tensors.write_tensor(response.vjp, answer.product, dtype)
        return response

    async def Jvp(self, request: pb.JvpRequest, context: Context) -> pb.JvpResponse:
        """Return D(x) and J u."""
        answer = await self._product(request, request.tangent, "tangent", "jvp", context)
        response, dtype = pb.JvpResponse(), request.output_dtype
        tensors.write_tensor(response.denoised, answer.mean, dtype)
        tensors.write_tensor(response.jvp, answer.product, dtype)
        return response

    async def Explain(
        self, request: pb.ExplainRequest, context: Context
    ) -> AsyncIterator[pb.ExplainResponse]:
        """Yield the explanation of each image; between two of them nothing is queued."""
        entry = self._engine.models.entry(request.model, request.version)
        if not entry.info.has_sources:
            able = [each.model for each in self._engine.models.newest() if each.info.has_sources]
            raise UnsupportedError(
                f"{entry.model} has no sources to name, as it is no analytic model with a bank, or "
                "has a fold or sizes; "
                f"models that have: {_listed(able)}"
            )
        query, top = gradients.read_explain(request, entry.info, self._limits)
        scheduling = context_of(context, request.priority, request.timeout_s)
        size = gradients.explanation_size(query.pixels.shape, MAX_SOURCES, entry.info)
        answers = self._engine.derive_each(entry, "explain", query, size, scheduling)
        index = 0
        async with contextlib.aclosing(answers):
            async for found in answers:
                assert isinstance(found, Explanation)
                yield gradients.write_explanation(index, found, top, entry.info)
                index += 1

    async def _product(
        self,
        request: gradients.ProductRequest,
        direction: pb.Tensor,
        field: str,
        kind: Direction,
        context: Context,
    ) -> Product:
        entry = self._engine.models.entry(request.model, request.version)
        if not entry.info.has_gradients:
            raise UnsupportedError(
                f"{entry.model} has no gradients: a model of kind {entry.info.kind} cannot be "
                "differentiated, or not with a fold or sizes"
            )
        query, along = gradients.read_product(request, direction, field, entry.info, self._limits)
        scheduling = context_of(context, request.priority, request.timeout_s)
        packed = with_direction(query, along)
        return product_of(await self._engine.derive(entry, kind, packed, scheduling))


def _listed(names: list[str]) -> str:
    more = ["…"] if len(names) > _LISTED else []
    return ", ".join([*names[:_LISTED], *more]) or "none is served"
