"""Calls of the repository, and of callers who ask while it changes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from tests.support.messages import asked, denoiser, inference
from tests.support.refusals import TIMEOUT_S

from els_proto.inference import grpc_service_pb2 as oip

X = np.random.default_rng(7).normal(size=(4, 1, 6, 5)).astype(np.float32)


async def load(channel: grpc.aio.Channel, name: str = "hot") -> None:
    request = oip.RepositoryModelLoadRequest(model_name=name)
    await inference(channel).RepositoryModelLoad(request, timeout=TIMEOUT_S)


async def unload(channel: grpc.aio.Channel, name: str = "hot") -> None:
    request = oip.RepositoryModelUnloadRequest(model_name=name)
    await inference(channel).RepositoryModelUnload(request, timeout=TIMEOUT_S)


async def index(channel: grpc.aio.Channel, **options: Any) -> dict[tuple[str, str], Any]:
    request = oip.RepositoryIndexRequest(**options)
    models = (await inference(channel).RepositoryIndex(request, timeout=TIMEOUT_S)).models
    return {(model.name, model.version): (model.state, model.reason) for model in models}


async def health(channel: grpc.aio.Channel, service: str) -> int:
    stub: Any = HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=service)
    return int((await stub.Check(request, timeout=TIMEOUT_S)).status)


async def answer(channel: grpc.aio.Channel, version: str = "", model: str = "hot") -> bytes:
    request = asked(X, model=model, version=version)
    return bytes((await denoiser(channel).Denoise(request, timeout=TIMEOUT_S)).denoised.data)


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def until(work: asyncio.Task[Any], call: Callable[[], Any], callers: int = 16) -> list[Any]:
    """Return what callers in a closed loop are answered until ``work`` is done."""
    answers: list[Any] = []

    async def caller() -> None:
        while not work.done():
            answers.append(await call())

    await asyncio.gather(work, *(caller() for _ in range(callers)))
    return answers
