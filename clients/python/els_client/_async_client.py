"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable
from contextlib import aclosing
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, Unpack, overload

from els_client import _codec as codec
from els_client import _moments as moments
from els_client._async_stream import AsyncStream
from els_client._channel import (
    SAMPLE_TIMEOUT_S,
    UNARY_TIMEOUT_S,
    bearer,
    channel_options,
    open_async_channel,
    own_errors,
    timeout_of,
)
from els_client._explanation import Explanation
from els_client._model_codec import decode_model
from els_client._models import Model
from els_client._originality import Originality, decode_originality, encode_originality
from els_client._remix import RemixOptions, encode_remix
from els_client._remix_inputs import Picture
from els_client._repository import AsyncRepository
from els_client._retries import RetryState, Trajectory
from els_client._route import Route
from els_client._sample_codec import encode_sample
from els_client._step import Step
from els_client._stream import Call, PendingQueries, check_in_flight
from els_client._types import (
    Evidence,
    Images,
    Pixels,
    Query,
    QueryOptions,
    SampleOptions,
    Tls,
)
from els_client.errors import ElsError, ResourceExhaustedError, UnavailableError
from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceStub
from els_proto.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub

_Response = TypeVar("_Response")


class AsyncClient:
    """``Client`` for asyncio: the same methods, awaited. Construct it in its event loop.

    Cancelling a task cancels its call. Concurrent calls share one connection, and the server
    batches them.

    Example:
        >>> async with AsyncClient() as client:
        ...     clean = await client.denoise(noisy, model="fashion-els", sigma=0.5)
    """

    def __init__(
        self,
        target: str = "127.0.0.1:50051",
        *,
        timeout_s: float | None = None,
        tls: Tls | None = None,
        token: str | None = None,
        wait_when_full: bool = False,
        healthy_only: bool = True,
    ) -> None:
        self._unary_timeout_s = timeout_of(timeout_s, UNARY_TIMEOUT_S)
        self._sample_timeout_s = timeout_of(timeout_s, SAMPLE_TIMEOUT_S)
        self._wait_when_full = wait_when_full
        self._metadata = bearer(token)
        self._route = Route.to(target)
        self._channel = open_async_channel(target, tls, channel_options(healthy_only=healthy_only))
        self._stub = DenoiserServiceStub(self._channel)
        self._inference = GRPCInferenceServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel and cancel calls in flight."""
        await self._channel.close()

    @property
    def repository(self) -> AsyncRepository:
        """Administration of the server."""
        return AsyncRepository(self._operate)

    async def models(self) -> list[Model]:
        """Like ``Client.models``."""
        response = await self._unary(self._stub.ListModels, pb.ListModelsRequest())
        return [decode_model(model) for model in response.models]

    async def model(self, name: str, *, version: str | None = None) -> Model:
        """Like ``Client.model``."""
        request = pb.GetModelRequest(name=name, version=version or "")
        return decode_model((await self._unary(self._stub.GetModel, request)).model)

    async def denoise(self, x: Pixels, **options: Unpack[QueryOptions]) -> Images:
        """Like ``Client.denoise``."""
        query = Query(x, **options)
        request = codec.encode_query(pb.DenoiseRequest, query)
        answer = await self._unary(self._stub.Denoise, request, query.timeout_s)
        return codec.decode_tensor(answer.denoised)

    async def denoise_with_evidence(
        self, x: Pixels, **options: Unpack[QueryOptions]
    ) -> tuple[Images, Images]:
        """Like ``Client.denoise_with_evidence``."""
        query = Query(x, **options)
        request = codec.encode_query(pb.DenoiseRequest, query, return_log_evidence=True)
        answer = await self._unary(self._stub.Denoise, request, query.timeout_s)
        return codec.decode_tensor(answer.denoised), codec.decode_tensor(answer.log_evidence)

    async def denoise_with_variance(
        self, x: Pixels, **options: Unpack[QueryOptions]
    ) -> tuple[Images, Images]:
        """Like ``Client.denoise_with_variance``."""
        query = Query(x, **options)
        request = codec.encode_query(pb.DenoiseRequest, query)
        request.return_variance = True
        answer = await self._unary(self._stub.Denoise, request, query.timeout_s)
        return codec.decode_tensor(answer.denoised), codec.decode_tensor(answer.variance)

    async def denoise_partial(
        self, x: Pixels, **options: Unpack[QueryOptions]
    ) -> tuple[Images, list[float]]:
        """Like ``Client.denoise_partial``."""
        query = Query(x, **options)
        request = codec.encode_query(pb.DenoiseRequest, query)
        request.allow_partial = True
        answer = await self._unary(self._stub.Denoise, request, query.timeout_s)
        return codec.decode_tensor(answer.denoised), list(answer.bank_shares)

    async def score(self, x: Pixels, **options: Unpack[QueryOptions]) -> Images:
        """Like ``Client.score``."""
        query = Query(x, **options)
        request = codec.encode_query(pb.ScoreRequest, query)
        answer = await self._unary(self._stub.Score, request, query.timeout_s)
        return codec.decode_tensor(answer.score)

    async def vjp(
        self,
        x: Pixels,
        cotangent: Pixels,
        *,
        evidence: Evidence | None = None,
        **options: Unpack[QueryOptions],
    ) -> tuple[Images, Images]:
        """Like ``Client.vjp``."""
        query = Query(x, **options)
        request = moments.encode_product(pb.VjpRequest, query, "cotangent", cotangent, evidence)
        answer = await self._unary(self._stub.Vjp, request, query.timeout_s)
        moments.keep_evidence(evidence, answer)
        return codec.decode_tensor(answer.denoised), codec.decode_tensor(answer.vjp)

    async def jvp(
        self,
        x: Pixels,
        tangent: Pixels,
        *,
        evidence: Evidence | None = None,
        **options: Unpack[QueryOptions],
    ) -> tuple[Images, Images]:
        """Like ``Client.jvp``."""
        query = Query(x, **options)
        request = moments.encode_product(pb.JvpRequest, query, "tangent", tangent, evidence)
        answer = await self._unary(self._stub.Jvp, request, query.timeout_s)
        moments.keep_evidence(evidence, answer)
        return codec.decode_tensor(answer.denoised), codec.decode_tensor(answer.jvp)

    async def explain(
        self, x: Pixels, *, top: int = 8, images: int = 0, **options: Unpack[QueryOptions]
    ) -> Explanation:
        """Like ``Client.explain``."""
        query = Query(x, **options)
        request = moments.encode_explain(query, top, images)

        async def explain(request: pb.ExplainRequest, **call: Any) -> list[pb.ExplainResponse]:
            return [message async for message in self._stub.Explain(request, **call)]

        timeout_s = timeout_of(query.timeout_s, self._sample_timeout_s)
        messages = await self._unary(explain, request, timeout_s)
        return moments.decode_explanation(messages, request.x.shape[0])

    async def originality(
        self, x: Pixels, *, nearest: int = 8, **options: Unpack[QueryOptions]
    ) -> tuple[Originality, ...]:
        """Like ``Client.originality``."""
        query = Query(x, **options)
        request = encode_originality(query, nearest)

        async def compare(
            request: pb.OriginalityRequest, **call: Any
        ) -> list[pb.OriginalityResponse]:
            return [message async for message in self._stub.Originality(request, **call)]

        timeout_s = timeout_of(query.timeout_s, self._sample_timeout_s)
        messages = await self._unary(compare, request, timeout_s)
        return decode_originality(messages, request.x.shape[0])

    @overload
    def denoise_many(
        self,
        queries: Iterable[Query] | AsyncIterable[Query],
        *,
        in_flight: int = 16,
        return_exceptions: Literal[False] = False,
    ) -> AsyncGenerator[Images, None]: ...

    @overload
    def denoise_many(
        self,
        queries: Iterable[Query] | AsyncIterable[Query],
        *,
        in_flight: int = 16,
        return_exceptions: bool,
    ) -> AsyncGenerator[Images | ElsError, None]: ...

    def denoise_many(
        self,
        queries: Iterable[Query] | AsyncIterable[Query],
        *,
        in_flight: int = 16,
        return_exceptions: bool = False,
    ) -> AsyncGenerator[Images | ElsError, None]:
        """Denoise a stream of queries like ``Client.denoise_many``; use ``async for``.

        A result is yielded as soon as it arrives, even while waiting for the next query.
        """
        check_in_flight(in_flight)
        return self._many(queries, in_flight, return_exceptions)

    def sample(
        self, *, timeout_s: float | None = None, **options: Unpack[SampleOptions]
    ) -> AsyncGenerator[Step, None]:
        """Sample images like ``Client.sample``; iterate with ``async for``.

        Leaving the loop early cancels the call when the iterator is garbage collected, and
        immediately inside ``async with contextlib.aclosing(client.sample(...)) as steps``.
        """
        timeout_s = timeout_of(timeout_s, self._sample_timeout_s)
        return self._steps(encode_sample(**options), timeout_s)

    async def remix(
        self,
        picture: Picture | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[RemixOptions],
    ) -> Images:
        """Like ``Client.remix``."""
        steps = self._remix(picture, timeout_s, options, previews=False)
        async with aclosing(steps):
            *_, last = [step async for step in steps]
        return last.x

    def remix_steps(
        self,
        picture: Picture | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[RemixOptions],
    ) -> AsyncGenerator[Step, None]:
        """Draw like ``Client.remix_steps``; iterate with ``async for``, which raises its errors."""
        return self._remix(picture, timeout_s, options, previews=True)

    async def _remix(
        self,
        picture: Picture | None,
        timeout_s: float | None,
        options: RemixOptions,
        *,
        previews: bool,
    ) -> AsyncGenerator[Step, None]:
        described = await self.model(options["model"], version=options.get("version"))
        request = encode_remix(described, picture, previews=previews, **options)
        steps = self._steps(request, timeout_of(timeout_s, self._sample_timeout_s))
        async with aclosing(steps):
            async for step in steps:
                yield step

    async def _operate(self, method: str, request: Any) -> Any:
        call = getattr(self._inference, method)
        return await self._unary(call, request, self._sample_timeout_s, pure=False)

    async def _unary(
        self,
        method: Callable[..., Awaitable[_Response]],
        request: Any,
        timeout_s: float | None = None,
        *,
        pure: bool = True,
    ) -> _Response:
        timeout_s = timeout_of(timeout_s, self._unary_timeout_s)
        attempts = RetryState(timeout_s, wait_when_full=self._wait_when_full)
        while True:
            try:
                with own_errors(self._route, timeout_s):
                    return await method(request, timeout=attempts.left_s(), metadata=self._metadata)
            except (ResourceExhaustedError, UnavailableError) as error:
                pause_s = attempts.pause_s(error) if pure else attempts.pause_if_full_s(error)
            await asyncio.sleep(pause_s)

    async def _steps(
        self, request: pb.SampleRequest, timeout_s: float
    ) -> AsyncGenerator[Step, None]:
        attempts = RetryState(timeout_s, wait_when_full=self._wait_when_full)
        trajectory = Trajectory(request, attempts)
        while True:
            call = self._stub.Sample(request, timeout=attempts.left_s(), metadata=self._metadata)
            try:
                with own_errors(self._route, timeout_s):
                    async for message in call:
                        if step := trajectory.accept(message):
                            yield step
                trajectory.check_complete()
                return
            except (ResourceExhaustedError, UnavailableError) as error:
                pause_s = trajectory.pause_s(error)
            finally:
                call.cancel()
            await asyncio.sleep(pause_s)

    async def _many(
        self,
        queries: Iterable[Query] | AsyncIterable[Query],
        in_flight: int,
        return_exceptions: bool,
    ) -> AsyncGenerator[Images | ElsError, None]:
        def open_stream() -> Call:
            return self._stub.DenoiseStream(metadata=self._metadata)

        pending = PendingQueries(self._unary_timeout_s, self._route)
        exchange = AsyncStream(queries, pending, in_flight, open_stream)
        async with aclosing(exchange.answers()) as answers:
            async for answer in answers:
                if isinstance(answer, ElsError) and not return_exceptions:
                    raise answer
                yield answer
