"""Traffic that shows every method, status and reason that the rules and the dashboard name."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tests.support.bad_inferences import SIGMA, X, infer
from tests.support.fault_server import FAULT
from tests.support.messages import asked, denoiser, images, images_computed, inference
from tests.support.models_folder import DOCUMENTS, SHAPE, write_models

from els_client import AsyncClient
from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.inference import grpc_service_pb2 as oip

QUEUE_S = "2"
"""Setting of the server: what may wait; twice what ``most_ends`` does, as batches of a busy machine
are predicted to take longer than they sleep."""
DRAIN_S = "4"
_TIMEOUT_S = 30


def models(root: Path) -> Path:
    """Write models, one of which is refused, and return their root."""
    chosen = {name: DOCUMENTS[name] for name in ("zeros", "wiener")}
    return write_models(root, {**chosen, "bad": "kind: analytic\nmachine: x\n"})


async def most_ends(target: str) -> None:
    """Ask a fresh fault server in every way; calls end in every way but overload and draining."""
    async with AsyncClient(target) as client, grpc.aio.insecure_channel(target) as channel:
        await _answered(client, channel)
        await _refused(channel)
        await _late_or_unwanted(channel)


async def overload(target: str) -> None:
    """Have a fault server reject calls of one caller as its queue is full, and evict others."""
    # A connection each: callers are told apart by their connections.
    own = [("grpc.use_local_subchannel_pool", 1)]
    async with (
        grpc.aio.insecure_channel(target, own) as channel,
        grpc.aio.insecure_channel(target, own) as other,
    ):
        await _overloaded(channel, other)


async def _answered(client: AsyncClient, channel: grpc.aio.Channel) -> None:
    x = np.zeros((2, *SHAPE), np.float32)
    await client.denoise(x, model="zeros", sigma=1.0)
    await client.score(x, model="zeros", sigma=1.0)
    assert [step.index async for step in client.sample(model="zeros", steps=2)] == [1, 2]
    await inference(channel).ModelInfer(infer(X, SIGMA), timeout=_TIMEOUT_S)
    stream = denoiser(channel).DenoiseStream(timeout=_TIMEOUT_S)
    await stream.write(asked(images(1)))
    await stream.done_writing()
    assert (await stream.read()).response.denoised.data
    assert await stream.code() is grpc.StatusCode.OK


async def _refused(channel: grpc.aio.Channel) -> None:
    ours, protocol = denoiser(channel), inference(channel)
    bad = oip.RepositoryModelLoadRequest(model_name="bad")
    await _ends("FAILED_PRECONDITION", protocol.RepositoryModelLoad(bad, timeout=_TIMEOUT_S))
    await _ends("NOT_FOUND", ours.Denoise(asked(images(1), model="nobody"), timeout=_TIMEOUT_S))
    await _ends("INVALID_ARGUMENT", ours.Denoise(asked(images(1), labels=[9]), timeout=_TIMEOUT_S))
    await _ends("INTERNAL", ours.Denoise(asked(images(FAULT)), timeout=_TIMEOUT_S))


async def _late_or_unwanted(channel: grpc.aio.Channel) -> None:
    """Ten images are ten batches: of a caller who leaves, some wait and one is computed."""
    ours, many = denoiser(channel), images(*range(10))
    # Predicted in 0.2 s: rejected.
    await _ends("DEADLINE_EXCEEDED", ours.Denoise(asked(many, timeout_s=0.05), timeout=_TIMEOUT_S))
    # Accepted, and then overtaken by 0.6 s of a higher priority until it expires.
    before = await images_computed(channel, "slow")
    expires = ours.Denoise(asked(many, timeout_s=0.5, priority=3), timeout=_TIMEOUT_S)
    while await images_computed(channel, "slow") == before:
        pass
    overtake = [ours.Denoise(asked(many, priority=1), timeout=_TIMEOUT_S) for _ in range(3)]
    await _ends("DEADLINE_EXCEEDED", expires)
    for call in overtake:
        await _ends("OK", call)
    before = await images_computed(channel, "slow")
    leaves = ours.Denoise(asked(images(*range(100))), timeout=_TIMEOUT_S)
    while await images_computed(channel, "slow") == before:
        pass
    leaves.cancel()
    assert await leaves.code() is grpc.StatusCode.CANCELLED


async def _overloaded(channel: grpc.aio.Channel, other: grpc.aio.Channel) -> None:
    many = images(*range(10))
    await other.channel_ready()
    calls = [denoiser(channel).Denoise(asked(many), timeout=_TIMEOUT_S) for _ in range(20)]
    codes = [asyncio.ensure_future(_code(call)) for call in calls]
    # The first that ends is rejected: the queue is full.
    await asyncio.wait(codes, return_when=asyncio.FIRST_COMPLETED)
    await _ends("OK", denoiser(other).Denoise(asked(many), timeout=_TIMEOUT_S))
    assert set(await asyncio.gather(*codes)) == {"OK", "RESOURCE_EXHAUSTED"}


async def trajectory(channel: grpc.aio.Channel) -> Any:
    """Return a call that takes longer than any drain, once it has begun."""
    call = denoiser(channel).Sample(pb.SampleRequest(model="slow", steps=1000), timeout=60)
    assert (await call.read()).index == 1
    return call


async def rest_of(call: Any) -> None:
    """Read what still comes of a call; raises as the call does."""
    while await call.read() is not grpc.aio.EOF:
        pass


async def _ends(code: str, call: Any) -> None:
    assert await _code(call) == code


async def _code(call: Any) -> str:
    return str((await call.code()).name)
