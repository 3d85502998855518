"""A device that hangs or fails: all calls fail, health reports it, the process ends with 3."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from tests.support.fault_server import BREAK, BROKEN, HANG
from tests.support.messages import asked, denoiser, images, images_computed
from tests.support.models_folder import DOCUMENTS, write_models
from tests.support.processes import FAULT_SERVER, START_S, environment, serving

from els_proto.denoise.v1 import denoise_pb2 as pb

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.mark.parametrize(
    ("value", "reason"), [(HANG, "cpu hangs"), (BREAK, "cpu is broken: CUDA error: as told")]
)
async def test_a_lost_device_fails_all_calls_and_ends_the_process_with_3(
    models: Path, value: float, reason: str
) -> None:
    options = {"ELS_WATCHDOG_S": "0.5", "ELS_DRAIN_S": "2"}
    with serving("--models", models, program=FAULT_SERVER, **options) as server:
        async with grpc.aio.insecure_channel(server.target) as channel:
            stub = denoiser(channel)
            health: Any = HealthStub(channel)
            watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=60)
            assert (await watch.read()).status == SERVING
            drawn = pb.SampleRequest(model="slow", steps=1000)
            trajectory = stub.Sample(drawn, timeout=60)
            assert (await trajectory.read()).index == 1
            stream = stub.DenoiseStream(timeout=60)
            await stream.write(asked(images(1)))
            assert (await stream.read()).response.denoised.data
            calls = [
                asyncio.ensure_future(stub.Denoise(asked(images(x)), timeout=60))
                for x in (value, 1.0, 2.0)
            ]
            for _ in range(20):
                await stream.write(asked(images(3)))
            for call in calls:
                with pytest.raises(grpc.aio.AioRpcError) as told:
                    await call
                assert told.value.code() is grpc.StatusCode.UNAVAILABLE
                assert reason in str(told.value.details())
            assert (await rest_of(trajectory))[-1].resume_token
            assert (await watch.read()).status == NOT_SERVING
            for answer in await rest_of(stream):
                assert answer.response.denoised.data or reason in answer.error.message
        assert await asyncio.to_thread(server.wait) == (3, "")


async def test_a_server_that_was_paused_beyond_its_watchdog_serves_on(models: Path) -> None:
    options = {"ELS_WATCHDOG_S": "0.5", "ELS_BATCH_S": "0.05"}
    with serving("--models", models, program=FAULT_SERVER, **options) as server:
        async with grpc.aio.insecure_channel(server.target) as channel:
            stub = denoiser(channel)
            call = asyncio.ensure_future(stub.Denoise(asked(images(*[1.0] * 20)), timeout=60))
            while not await images_computed(channel, "slow"):
                pass
            server.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(1.2)
            server.process.send_signal(signal.SIGCONT)
            assert (await call).denoised.data
            assert (await stub.Denoise(asked(images(2.0)), timeout=60)).denoised.data
        server.terminate()
        assert await asyncio.to_thread(server.wait) == (0, "")


def test_a_device_that_breaks_while_models_are_loaded_ends_the_process_with_3(
    tmp_path: Path,
) -> None:
    models = write_models(tmp_path / "models", {BROKEN: DOCUMENTS["gaussian"]})
    ended = subprocess.run(
        [*map(str, FAULT_SERVER), "run", "--port=0", "--metrics-port=0", f"--models={models}"],
        capture_output=True,
        text=True,
        timeout=START_S,
        env=environment(ELS_GRACE_S="0"),
        check=False,
    )
    assert ended.returncode == 3
    assert "els-server: cpu is broken: CUDA error: as told" in ended.stderr


async def rest_of(call: Any) -> list[Any]:
    """Return the messages that come before the call ends with UNAVAILABLE."""
    messages = []
    with contextlib.suppress(grpc.aio.AioRpcError):
        while (message := await call.read()) is not grpc.aio.EOF:
            messages.append(message)
    assert await call.code() is grpc.StatusCode.UNAVAILABLE
    return messages
