"""The twin of the blocking client for asyncio."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection
from types import TracebackType
from typing import Self, TypeVar

import grpc

from els_client import _codec as codec
from els_client._channel import (
    SAMPLE_TIMEOUT_S,
    UNARY_TIMEOUT_S,
    bearer,
    open_async_channel,
    own_errors,
)
from els_client._types import Images, Integers, Levels, Model, Pixels, Sampler, Step, Tls, Want
from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceStub

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class AsyncClient:
    """``Client`` for asyncio: the same methods, awaited. Make it where its event loop runs.

    Cancelling a task cancels its call. Many calls at once share one connection, and a server
    computes together what arrives together.

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
    ) -> None:
        self._unary_timeout_s = UNARY_TIMEOUT_S if timeout_s is None else timeout_s
        self._sample_timeout_s = SAMPLE_TIMEOUT_S if timeout_s is None else timeout_s
        self._metadata = bearer(token)
        self._channel = open_async_channel(target, tls)
        self._stub = DenoiserServiceStub(self._channel)

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
        """Close the channel; calls under way are cancelled."""
        await self._channel.close()

    async def models(self) -> list[Model]:
        """Return what ``Client.models`` does."""
        response = await self._unary(self._stub.ListModels, pb.ListModelsRequest())
        return [codec.decode_model(model) for model in response.models]

    async def model(self, name: str) -> Model:
        """Return what ``Client.model`` does."""
        request = pb.GetModelRequest(name=name)
        return codec.decode_model((await self._unary(self._stub.GetModel, request)).model)

    async def denoise(
        self,
        x: Pixels,
        *,
        model: str,
        sigma: Levels | None = None,
        alpha_bar: Levels | None = None,
        time: Levels | None = None,
        label: Integers | None = None,
        window: Integers | None = None,
    ) -> Images:
        """Return what ``Client.denoise`` does."""
        level = codec.encode_level(sigma, alpha_bar, time)
        request = codec.encode_query(pb.DenoiseRequest, x, model, level, label, window)
        return codec.decode_tensor((await self._unary(self._stub.Denoise, request)).denoised)

    async def denoise_with_evidence(
        self,
        x: Pixels,
        *,
        model: str,
        sigma: Levels | None = None,
        alpha_bar: Levels | None = None,
        time: Levels | None = None,
        label: Integers | None = None,
        window: Integers | None = None,
    ) -> tuple[Images, Images]:
        """Return what ``Client.denoise_with_evidence`` does."""
        level = codec.encode_level(sigma, alpha_bar, time)
        request = codec.encode_query(pb.DenoiseRequest, x, model, level, label, window, True)
        response = await self._unary(self._stub.Denoise, request)
        return codec.decode_tensor(response.denoised), codec.decode_tensor(response.log_evidence)

    async def score(
        self,
        x: Pixels,
        *,
        model: str,
        sigma: Levels | None = None,
        alpha_bar: Levels | None = None,
        time: Levels | None = None,
        label: Integers | None = None,
        window: Integers | None = None,
    ) -> Images:
        """Return what ``Client.score`` does."""
        level = codec.encode_level(sigma, alpha_bar, time)
        request = codec.encode_query(pb.ScoreRequest, x, model, level, label, window)
        return codec.decode_tensor((await self._unary(self._stub.Score, request)).score)

    def sample(
        self,
        *,
        model: str,
        count: int = 1,
        seed: int = 0,
        steps: int = 20,
        sampler: Sampler = "ddim",
        label: Integers | None = None,
        eta: float | None = 0.0,
        churn: float = 0.0,
        want: Collection[Want] = ("x", "denoised"),
        window: Integers | None = None,
    ) -> AsyncGenerator[Step, None]:
        """Draw images as ``Client.sample`` does; iterate with ``async for``.

        A loop left early cancels the call when the iterator is dropped, and at once inside
        ``async with contextlib.aclosing(client.sample(...)) as steps``.
        """
        request = codec.encode_sample(
            model=model,
            count=count,
            seed=seed,
            steps=steps,
            sampler=sampler,
            label=label,
            window=window,
            eta=eta,
            churn=churn,
            want=want,
        )
        return self._steps(request)

    async def _unary(
        self, method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response], request: _Request
    ) -> _Response:
        with own_errors():
            return await method(request, timeout=self._unary_timeout_s, metadata=self._metadata)

    async def _steps(self, request: pb.SampleRequest) -> AsyncGenerator[Step, None]:
        call = self._stub.Sample(request, timeout=self._sample_timeout_s, metadata=self._metadata)
        try:
            with own_errors():
                async for message in call:
                    yield codec.decode_step(message)
        finally:
            call.cancel()
