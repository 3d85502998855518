"""Storms of cancelled calls: memory stays flat, nothing stays under way, answers stay right."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tests.support.bad_inferences import SIGMA, X, infer
from tests.support.bad_requests import denoise, sample
from tests.support.messages import array, asked, denoiser, inference
from tests.support.metrics import metrics
from tests.support.processes import FAULT_SERVER, ServerProcess, serving
from tests.support.refusals import TIMEOUT_S

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.inference import grpc_service_pb2 as oip

CONNECTIONS, CALLERS = 4, 32
WAVES, WAVE_CALLS = 3, 1500
GROWTH_BYTES = 24 << 20
"""What later waves may add to the first one's resident memory: arenas of malloc, not leaks, which
at a request's size for each call would be hundreds of MiB."""
LARGE = np.zeros((32, 3, 32, 32), np.float32)
UNDER_WAY = ("els_calls_in_flight", "els_queue_items", "els_trajectories")

Ask = Callable[[grpc.aio.Channel], Any]


@pytest.fixture(scope="module")
def stormed(models: Path) -> Iterator[ServerProcess]:
    """A server with a slow model and a short queue, which fills in a storm."""
    options = {"ELS_QUEUE_S": "2"}
    with serving("--models", models, "--threads", 1, program=FAULT_SERVER, **options) as process:
        yield process


async def _requests() -> AsyncIterator[pb.DenoiseRequest]:
    for i in range(200):
        yield denoise() if i % 4 else asked(np.ones((1, 1, 6, 5), np.float32))


ASKS: dict[str, Ask] = {
    "unary": lambda channel: denoiser(channel).Denoise(denoise(), timeout=TIMEOUT_S),
    "queued": lambda channel: denoiser(channel).Denoise(
        asked(np.ones((2, 1, 6, 5), np.float32)), timeout=TIMEOUT_S
    ),
    "hasty": lambda channel: denoiser(channel).Denoise(
        asked(np.ones((2, 1, 6, 5), np.float32)), timeout=random.uniform(0.001, 0.1)
    ),
    "large": lambda channel: denoiser(channel).Denoise(
        asked(LARGE, model="gaussian"), timeout=TIMEOUT_S
    ),
    "protocol": lambda channel: inference(channel).ModelInfer(infer(X, SIGMA), timeout=TIMEOUT_S),
    "stream": lambda channel: denoiser(channel).DenoiseStream(_requests(), timeout=TIMEOUT_S),
    "sample": lambda channel: denoiser(channel).Sample(
        sample(model="gaussian", count=8, steps=1000, return_x=True), timeout=TIMEOUT_S
    ),
    "slow sample": lambda channel: denoiser(channel).Sample(
        sample(model="slow", steps=50), timeout=TIMEOUT_S
    ),
    "index": lambda channel: inference(channel).RepositoryIndex(
        oip.RepositoryIndexRequest(), timeout=TIMEOUT_S
    ),
    "load": lambda channel: inference(channel).RepositoryModelLoad(
        oip.RepositoryModelLoadRequest(model_name="ideal"), timeout=TIMEOUT_S
    ),
}


async def _read(call: Any) -> None:
    if isinstance(call, Awaitable):
        await call
    else:
        async for _ in call:
            pass


async def _leave(ask: Ask, channel: grpc.aio.Channel) -> None:
    """Ask, and be gone at any moment of it."""
    call = ask(channel)
    reading = asyncio.ensure_future(_read(call))
    # There is no event to wait for: the server may be anywhere.
    await asyncio.wait([reading], timeout=random.expovariate(1 / 0.02))
    call.cancel()
    with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
        await reading


async def _wave(server: ServerProcess) -> None:
    """Make calls of all kinds over several connections, of which one is closed under way."""
    asks, calls = list(ASKS.values()), iter(range(WAVE_CALLS))

    async def caller(channel: grpc.aio.Channel) -> None:
        for i in calls:
            await _leave(asks[i % len(asks)], channel)

    own = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(server.target, own) for _ in range(CONNECTIONS)]
    under_way = [asyncio.ensure_future(caller(channels[i % CONNECTIONS])) for i in range(CALLERS)]
    await asyncio.gather(*under_way)
    for channel in channels:
        await channel.close()


async def _settled(server: ServerProcess) -> None:
    """Return once nothing is under way any more; the test's timeout ends a wait for ever."""
    while True:
        found = await asyncio.to_thread(metrics, server)
        if not any(value for name in UNDER_WAY for _, value in found[name]):
            return


def _resident_bytes(server: ServerProcess) -> int:
    status = Path(f"/proc/{server.process.pid}/smaps_rollup").read_text()
    return 1024 * int(next(line for line in status.splitlines() if "Rss" in line).split()[1])


@pytest.mark.timeout(120)
async def test_a_storm_of_cancelled_calls_leaves_nothing_behind_and_changes_no_answer(
    stormed: ServerProcess,
) -> None:
    random.seed(3)
    noisy = np.random.default_rng(0).normal(size=(4, 1, 6, 5)).astype(np.float32)
    request = asked(noisy, model="circular")
    already, answers, resident = len(stormed.records()), [], []
    async with grpc.aio.insecure_channel(stormed.target) as channel:
        stub = denoiser(channel)

        async def honest() -> None:
            while True:
                answers.append(await stub.Denoise(request, timeout=TIMEOUT_S))

        expected = array((await stub.Denoise(request, timeout=TIMEOUT_S)).denoised)
        for _ in range(WAVES):
            caller = asyncio.ensure_future(honest())
            await _wave(stormed)
            caller.cancel()
            await asyncio.wait([caller])
            assert caller.cancelled() or caller.exception() is None
            await _settled(stormed)
            resident.append(_resident_bytes(stormed))
    assert len(answers) > 10 * WAVES
    assert all(array(answer.denoised).tobytes() == expected.tobytes() for answer in answers)
    assert max(resident[1:]) < resident[0] + GROWTH_BYTES, resident
    bad = [one for one in stormed.records()[already:] if one["level"] in ("warning", "error")]
    assert bad == []
