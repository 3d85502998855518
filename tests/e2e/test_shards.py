"""A server whose bank is in processes: callers see no difference, and no process outlives it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from grpc_status import rpc_status
from tests.support.processes import ServerProcess, serving
from tests.support.sharded_models import SHAPE, eventually, write_sharded_models

from els_client import AsyncClient, Client
from els_proto.denoise.v1 import denoise_pb2
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceStub

pytestmark = pytest.mark.e2e


@pytest.fixture
def sharded(tmp_path: Path) -> Iterator[ServerProcess]:
    models = write_sharded_models(tmp_path / "models")
    with serving("--models", models, "--threads", 1, ELS_SHARD_RESTART_S="0") as process:
        yield process


def shard_pids(server: ServerProcess) -> list[int]:
    """Return the processes of shards of a server."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            parent = re.search(r"^PPid:\s+(\d+)", (folder / "status").read_text(), re.MULTILINE)
        except OSError:
            continue
        if b"els_service.shards.process" in command and parent is not None:
            found += [int(folder.name)] if int(parent[1]) == server.process.pid else []
    return found


def is_alive(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


def image(server: ServerProcess, model: str) -> np.ndarray[Any, Any]:
    x = np.random.default_rng(0).normal(size=(1, *SHAPE)).astype(np.float32)
    with Client(server.target, timeout_s=60) as client:
        return client.denoise(x, model=model, sigma=0.5, label=1)


def in_part(server: ServerProcess) -> tuple[np.ndarray[Any, Any], list[float]]:
    with Client(server.target, timeout_s=60) as client:
        return client.denoise_partial(np.zeros((1, *SHAPE)), model="zeros-sharded", sigma=0.5)


async def in_part_async(server: ServerProcess) -> tuple[np.ndarray[Any, Any], list[float]]:
    async with AsyncClient(server.target, timeout_s=60) as client:
        return await client.denoise_partial(np.zeros((1, *SHAPE)), model="zeros-sharded", sigma=0.5)


def ask_once(server: ServerProcess) -> Any:
    """Ask without retries; return the response, or the error."""
    tensor = denoise_pb2.Tensor(shape=[1, *SHAPE], dtype=denoise_pb2.DTYPE_F32, data=bytes(4 * 30))
    request = denoise_pb2.DenoiseRequest(model="zeros-sharded", x=tensor)
    request.level.sigma.append(0.5)
    with grpc.insecure_channel(server.target, [("grpc.enable_retries", 0)]) as channel:
        try:
            return DenoiserServiceStub(channel).Denoise(request, timeout=30)
        except grpc.RpcError as error:
            return error


def test_a_server_of_shards_answers_as_one_process_and_leaves_none(sharded: ServerProcess) -> None:
    pids = shard_pids(sharded)
    assert len(pids) == 2
    want = image(sharded, "zeros")
    assert np.array_equal(image(sharded, "zeros-sharded"), want)
    assert re.search('els_shard_ready{bank="fashion-[0-9a-f]+",shard="1"} 1.0', metrics(sharded))

    complete, shares = in_part(sharded)
    assert shares == [1.0]
    assert complete.tobytes() == ask_once(sharded).denoised.data

    # Without time to wait for a restart, a caller is asked to come back.
    os.kill(pids[0], signal.SIGKILL)
    eventually(lambda: pids[0] not in shard_pids(sharded))
    part, shares = in_part(sharded)
    assert 0.2 < shares[0] < 0.8
    again, _ = asyncio.run(in_part_async(sharded))
    assert np.array_equal(again, part)
    error = ask_once(sharded)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "is incomplete: shard" in error.details()
    status = rpc_status.from_call(error)
    assert status is not None
    assert any(detail.Is(RetryInfo.DESCRIPTOR) for detail in status.details)
    eventually(lambda: is_back(sharded))
    assert np.array_equal(image(sharded, "zeros-sharded"), want)

    pids = shard_pids(sharded)
    sharded.process.send_signal(signal.SIGKILL)
    eventually(lambda: not any(map(is_alive, pids)))


def metrics(server: ServerProcess) -> str:
    return server.page("/metrics")[1]


def is_back(server: ServerProcess) -> bool:
    return re.search("els_shard_ready{.*} 0.0", metrics(server)) is None
