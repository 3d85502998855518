"""From the first line on stdout to exit code 0: starting, refusing to start, draining."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from tests.support.models_folder import DOCUMENTS, write_models, write_slow_models
from tests.support.processes import BIN, environment, page, run, serving
from tests.support.refusals import TIMEOUT_S, refused

from els_client import AsyncClient, Client, Step, UnavailableError
from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceStub
from els_service.config import Settings
from els_service.server.server import stop_at_most_s

SERVING = health_pb2.HealthCheckResponse.SERVING
BUSY_S = 30
"""What a busy machine may add."""
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def status(target: str, service: str) -> int:
    async with grpc.aio.insecure_channel(target) as channel:
        stub: Any = HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        return int((await stub.Check(request, timeout=TIMEOUT_S)).status)


def watched(channel: grpc.aio.Channel) -> Any:
    """Return a watch of the overall health."""
    stub: Any = HealthStub(channel)
    return stub.Watch(health_pb2.HealthCheckRequest(), timeout=60)


async def rest_of(steps: AsyncIterator[Step]) -> list[int]:
    return [step.index async for step in steps]


async def code_of_a_call(channel: grpc.aio.Channel) -> grpc.StatusCode:
    """Return how a small call ends."""
    request = pb.SampleRequest(model="zeros", steps=1)
    call: Any = DenoiserServiceStub(channel).Sample(request, timeout=TIMEOUT_S)
    with contextlib.suppress(grpc.aio.AioRpcError):  # what it ended with is asked below
        await call.read()
    code: grpc.StatusCode = await call.code()
    return code


async def test_a_drain_answers_every_call_in_flight_and_refuses_new_ones(models: Path) -> None:
    with serving("--models", models, "--threads", 1) as server:
        async with (
            AsyncClient(server.target) as client,
            grpc.aio.insecure_channel(server.target) as channel,
        ):
            watch = watched(channel)
            assert (await watch.read()).status == SERVING
            slow = [client.sample(model="zeros", count=32, steps=20, seed=i) for i in range(8)]
            for steps in slow:
                assert (await anext(steps)).index == 1
            server.terminate()
            assert (await watch.read()).status == NOT_SERVING
            assert server.page("/readyz") == (503, "not ready: the server is draining\n")
            assert server.page("/healthz") == (200, "ok\n")
            # The latter where gRPC drops a call that its shutdown overtakes: one that is on its way
            # when the connection is told to go away, and no other.
            told = await code_of_a_call(channel)
            assert told in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
            await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
            async with grpc.aio.insecure_channel(server.target) as another:
                for late in (channel, another):
                    assert await code_of_a_call(late) is grpc.StatusCode.UNAVAILABLE

            indices = await asyncio.gather(*map(rest_of, slow))
            assert indices == [list(range(2, 21))] * 8
        assert await asyncio.to_thread(server.wait) == (0, "")
        assert [record for record in server.records() if record["level"] == "error"] == []


async def test_a_slow_reader_gets_its_last_step_even_if_the_server_drains(models: Path) -> None:
    with serving("--models", models) as server:
        async with grpc.aio.insecure_channel(server.target) as channel:
            watch = watched(channel)
            assert (await watch.read()).status == SERVING
            request = pb.SampleRequest(
                model="gaussian", count=64, steps=20, return_x=True, return_denoised=True
            )
            call: Any = DenoiserServiceStub(channel).Sample(request, timeout=TIMEOUT_S)
            assert (await call.read()).index == 1
            server.terminate()
            assert (await watch.read()).status == NOT_SERVING
            rest = [(await call.read()).index for _ in range(19)]
            assert rest == list(range(2, 21))
            assert await call.code() is grpc.StatusCode.OK
        assert await asyncio.to_thread(server.wait) == (0, "")


def test_a_drain_ends_in_bounded_time_even_if_a_caller_never_reads(models: Path) -> None:
    with serving("--models", models, ELS_DRAIN_S="0.5") as server:
        with grpc.insecure_channel(server.target) as channel:
            request = pb.SampleRequest(
                model="gaussian", count=128, steps=1000, return_x=True, return_denoised=True
            )
            call: Any = DenoiserServiceStub(channel).Sample(request, timeout=60)
            next(call)
            server.terminate()
            at_most_s = stop_at_most_s(Settings(drain_s=0.5, grace_s=0))
            assert server.wait(at_most_s + BUSY_S) == (0, "")
            call.cancel()
        with Client(server.target, timeout_s=20) as client, pytest.raises(UnavailableError):
            client.models()
        assert [record for record in server.records() if record["level"] == "error"] == []


async def test_one_bad_model_is_named_and_not_serving_while_the_others_serve(
    tmp_path: Path,
) -> None:
    root = write_models(tmp_path / "models", {**DOCUMENTS, "bad": "kind: analytic\nmachine: x\n"})
    (root / "late").mkdir()
    (root / "late" / "model.yaml").write_text("kind: gaussian\nshape: [1, 2, 2001-13-01]\n")
    with serving("--models", root) as server:
        async with AsyncClient(server.target) as client:
            assert [model.name for model in await client.models()] == sorted(DOCUMENTS)
            await client.denoise(np.zeros((1, 1, 6, 5), np.float32), model="zeros", sigma=1)
        for name, expected in {"bad": NOT_SERVING, "late": NOT_SERVING, "zeros": SERVING}.items():
            assert await status(server.target, name) == expected
        assert await status(server.target, "") == SERVING
        refusals = {
            record["model"]: record["reason"]
            for record in server.records()
            if record["event"] == "model refused"
        }
        for name in ("bad", "late"):
            assert str(root / name / "model.yaml") in refusals[name]


@pytest.mark.parametrize("option", ["port", "metrics-port"])
def test_a_port_in_use_is_named_and_the_server_refuses_to_start(models: Path, option: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ports = {"port": 0, "metrics-port": 0, option: port}
        options = [f"--{name}={number}" for name, number in ports.items()]
        done = run("els-server", "run", "--models", models, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"127.0.0.1:{port}" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--models", "/nowhere/at/all"), "/nowhere/at/all: expected a folder of models"),
        (("--device", "cuda"), "device: expected a CUDA device, found none"),
        (("--host", "256.0.0.1"), "host: expected an address, or a resolvable name, got 256"),
    ],
)
def test_a_setting_that_cannot_be_met_is_named(options: tuple[str, str], message: str) -> None:
    done = run("els-server", "run", "--port=0", "--metrics-port=0", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_sigterm_while_models_are_loaded_ends_the_server_with_exit_code_0(tmp_path: Path) -> None:
    root = write_slow_models(tmp_path / "models")
    with socket.socket() as free, socket.socket() as other:
        for one in (free, other):
            one.bind(("127.0.0.1", 0))
        port, metrics_port = free.getsockname()[1], other.getsockname()[1]
    ports = f"--port={port}", f"--metrics-port={metrics_port}"
    process = subprocess.Popen(
        [BIN / "els-server", "run", "--models", root, *ports],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    try:
        at_once = [("grpc.max_reconnect_backoff_ms", 100)]
        with grpc.insecure_channel(f"127.0.0.1:{port}", at_once) as channel:
            stub: Any = HealthStub(channel)
            request = health_pb2.HealthCheckRequest()
            health = stub.Check(request, timeout=TIMEOUT_S, wait_for_ready=True)
            assert health.status == NOT_SERVING
            loading = "not ready: models are being loaded\n"
            assert page(metrics_port, "/readyz") == (503, loading)
            ask = DenoiserServiceStub(channel).GetModel
            early = refused(lambda: ask(pb.GetModelRequest(name="z"), timeout=TIMEOUT_S))
            assert early.code() is grpc.StatusCode.UNAVAILABLE
            process.terminate()
            stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    assert (process.returncode, stdout) == (0, b"")
    assert b"Traceback" not in stderr
    assert b"exception" not in stderr


@pytest.mark.parametrize("after_s", [0.3, 0.9])
def test_sigterm_while_the_program_is_loaded_ends_it_with_exit_code_0(
    models: Path, after_s: float
) -> None:
    process = subprocess.Popen(
        [BIN / "els-server", "run", "--models", models, "--port=0", "--metrics-port=0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(ELS_GRACE_S="0"),
    )
    try:
        time.sleep(after_s)  # nothing tells how far an import is
        process.terminate()
        _, stderr = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    assert (process.returncode, b"Traceback" in stderr) == (0, False)


def test_sigterm_again_and_again_changes_neither_the_drain_nor_the_exit_code(models: Path) -> None:
    with serving("--models", models, "--threads", 1) as server, Client(server.target) as client:
        steps = client.sample(model="zeros", count=32, steps=40)
        assert next(steps).index == 1
        stop = threading.Event()

        def insist() -> None:
            while server.process.poll() is None and not stop.wait(0.005):
                server.terminate()

        insisting = threading.Thread(target=insist)
        insisting.start()
        try:
            assert [step.index for step in steps] == list(range(2, 41))
            assert server.wait() == (0, "")
        finally:
            stop.set()
            insisting.join()
