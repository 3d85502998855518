from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from tests.fuzz.good import write_world
from tests.fuzz.verdict import MOST_BYTES
from tests.support.metrics import metrics
from tests.support.processes import ServerProcess, serving

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceStub

PAUSE_S = 0.02
MOST_GROWTH = 64 << 20
MOST_FILES = 32


@pytest.fixture(scope="module")
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server of small limits that ends this module unharmed, without an error in its log."""
    models = write_world(tmp_path_factory.mktemp("fuzz") / "models")
    limits = {
        "ELS_MAX_IMAGES": "8",
        "ELS_MAX_STEPS": "6",
        "ELS_MAX_MESSAGE_BYTES": str(MOST_BYTES),
    }
    special: dict[str, str] = getattr(request.module, "ENVIRONMENT", {})
    with serving("--models", models, "--threads", 1, **limits, **special) as process:
        yield process
        assert process.process.poll() is None
        # grpc's own services answer garbage with an error of theirs.
        faults = [
            record
            for record in process.records()
            if record["level"] == "error" and "[/grpc." not in record["event"]
        ]
        assert faults == []


@pytest.fixture(scope="module")
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.target) as channel:
        yield channel


@pytest.fixture(scope="module", autouse=True)
def _the_process_stays_small(server: ServerProcess, channel: grpc.Channel) -> Iterator[None]:
    canary(channel)
    before = footprint(server)
    yield
    memory, files = footprint(server)
    assert memory - before[0] < MOST_GROWTH
    assert files - before[1] < MOST_FILES


@pytest.fixture(scope="module", autouse=True)
def _a_canary_gets_the_same_bits_throughout(server: ServerProcess) -> Iterator[None]:
    stop, wrong, asked = threading.Event(), [], 0
    with grpc.insecure_channel(server.target) as own:
        expected = canary(own)

        def watch() -> None:
            nonlocal asked
            while not stop.wait(PAUSE_S):
                try:
                    if canary(own) != expected:
                        wrong.append("other bits")
                except grpc.RpcError as error:
                    wrong.append(str(error))
                asked += 1

        thread = threading.Thread(target=watch)
        thread.start()
        yield
        stop.set()
        thread.join()
    assert asked
    assert wrong == []


def canary(channel: grpc.Channel) -> bytes:
    """Return the answer to a question whose answer never changes."""
    x = np.random.default_rng(7).normal(size=(2, 1, 6, 5)).astype("<f4")
    request = pb.DenoiseRequest(
        model="canary",
        x=pb.Tensor(dtype=pb.DTYPE_F32, shape=x.shape, data=x.tobytes()),
        level=pb.NoiseLevel(sigma=[0.4, 3.0]),
        return_log_evidence=True,
        priority=1,
    )
    answer = DenoiserServiceStub(channel).Denoise(request, timeout=20)
    return answer.denoised.data + answer.log_evidence.data


def footprint(server: ServerProcess) -> tuple[float, int]:
    """Return the bytes that a process holds, and its open files.

    Resident, less what malloc keeps of what was given back: one message of 16 MiB leaves up to 100.
    """
    process = Path(f"/proc/{server.process.pid}")
    status = (process / "status").read_text()
    resident = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    kept = metrics(server)["els_malloc_free_bytes"][0][1]
    return (int(resident.split()[1]) << 10) - kept, len(list((process / "fd").iterdir()))
