"""Fair admission: one caller floods a slow model, and another asks for less than its share."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from tests.support import flood
from tests.support.http_client import HttpClient
from tests.support.messages import array, asked, denoiser, images
from tests.support.processes import ServerProcess, environment
from tests.support.refusals import TIMEOUT_S

from els_proto.denoise.v1 import denoise_pb2 as pb

FLOOD = Path(flood.__file__)


@asynccontextmanager
async def flooded(target: str) -> AsyncIterator[dict[str, int]]:
    """Flood a server by another process; what became of its calls is there afterwards."""
    pipe = asyncio.subprocess.PIPE
    path = os.pathsep.join((str(FLOOD.parents[2]), os.environ.get("PYTHONPATH", "")))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        FLOOD,
        target,
        stdin=pipe,
        stdout=pipe,
        env=environment(PYTHONPATH=path),
    )
    outcomes: dict[str, int] = {}
    try:
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), 60) == b"full\n"
        yield outcomes
        rest, _ = await asyncio.wait_for(process.communicate(b""), 60)
        outcomes.update(json.loads(rest))
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize("priority", [pytest.param(1, marks=pytest.mark.nightly), 3])
async def test_calls_within_the_share_are_never_refused_while_another_process_floods_the_model(
    fault_server: ServerProcess, priority: int
) -> None:
    async with (
        flooded(fault_server.target) as outcomes,
        grpc.aio.insecure_channel(fault_server.target) as channel,
    ):
        x = images(*range(10))  # 0.2 s of the 2 s that may wait
        for _ in range(6):
            request = asked(x, priority=priority)
            answer = await denoiser(channel).Denoise(request, timeout=TIMEOUT_S)
            assert np.array_equal(array(answer.denoised), 2 * x)
    assert outcomes["RESOURCE_EXHAUSTED"] > 0
    assert outcomes["OK"] > 0
    assert outcomes.keys() == {"OK", "RESOURCE_EXHAUSTED"}


async def test_calls_over_http_within_the_share_are_not_refused_either(
    fault_server: ServerProcess,
) -> None:
    x = images(*range(10))
    contents = {
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": x.shape, "data": x.ravel().tolist()},
            {"name": "sigma", "datatype": "FP32", "shape": [1], "data": [1.0]},
        ],
        "outputs": [{"name": "denoised"}],
    }
    async with flooded(fault_server.target) as outcomes:
        with HttpClient(fault_server.ready["http_port"]) as http:
            for _ in range(3):
                reply = await asyncio.to_thread(http.post, "/v2/models/slow/infer", contents)
                assert reply.status == 200, reply.body
                assert reply.json["outputs"][0]["data"] == (2 * x).ravel().tolist()
    assert outcomes["RESOURCE_EXHAUSTED"] > 0


async def test_samples_that_fill_the_queue_do_not_refuse_another_s_and_lose_nothing(
    fault_server: ServerProcess,
) -> None:
    def drawn(token: bytes = b"") -> pb.SampleRequest:
        return pb.SampleRequest(
            model="slow", count=10, steps=2, seed=9, return_x=True, resume_token=token
        )

    full = asyncio.Event()

    async def sample(channel: grpc.aio.Channel) -> tuple[list[bytes], int]:
        """Return x of all steps, and how often it had to be resumed."""
        taken: list[bytes] = []
        token, resumed = b"", 0
        while True:
            try:
                async for step in denoiser(channel).Sample(drawn(token), timeout=TIMEOUT_S):
                    if step.index:
                        taken.append(step.x.data)
                    token = step.resume_token or token
                return taken, resumed
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise
                full.set()
                resumed += 1
                await asyncio.sleep(0.1)

    async with (
        grpc.aio.insecure_channel(
            fault_server.target, [("grpc.use_local_subchannel_pool", 1)]
        ) as one,
        grpc.aio.insecure_channel(
            fault_server.target, [("grpc.use_local_subchannel_pool", 1)]
        ) as other,
    ):
        alone, _ = await sample(one)
        # 0.2 s a step each of 2 s: ten of them fill the queue, and the eleventh is refused.
        first = denoiser(one).Sample(drawn(), timeout=TIMEOUT_S)
        await first.read()
        many = [asyncio.ensure_future(sample(one)) for _ in range(12)]
        await full.wait()
        assert await sample(other) == (alone, 0)
        ends = await asyncio.gather(*many)
        first.cancel()
    assert all(taken == alone for taken, _ in ends)
    assert sum(resumed for _, resumed in ends) > 0
