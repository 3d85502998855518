"""Model volumes that are empty, broken or not there yet: NOT_SERVING and words, and no crash."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from tests.support.models_folder import write_models
from tests.support.processes import ServerProcess, run, serving
from tests.support.refusals import TIMEOUT_S, refused
from tests.support.security import Certificates

from els_client import Client, NotFoundError
from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceStub
from els_service.server.health import ALIVE

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
NOTHING = ["no model is served"]


def health(target: str, service: str) -> int:
    with grpc.insecure_channel(target) as channel:
        stub: Any = HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        return int(stub.Check(request, timeout=TIMEOUT_S).status)


def complaint(server: ServerProcess) -> str:
    """Return the reason in the one error that was logged."""
    (record,) = (record for record in server.records() if record["level"] == "error")
    assert [record["event"]] == NOTHING
    return str(record["reason"])


def fill(volume: Path) -> None:
    """Put models where the volume leads, as whoever mends it would."""
    if volume.is_symlink() and volume.readlink() != Path(volume.name):
        write_models(volume.parent / volume.readlink())
        return
    volume.rmdir() if volume.is_dir() else volume.unlink()
    write_models(volume)


VOLUMES: dict[str, tuple[Callable[[Path], object], str]] = {
    "an empty folder": (Path.mkdir, "the folder has no model"),
    "a file in place of the folder": (Path.touch, "Not a directory"),
    "a mount that leads nowhere": (lambda path: path.symlink_to("gone"), "No such file"),
}


@pytest.mark.parametrize(("make", "reason"), VOLUMES.values(), ids=VOLUMES)
def test_a_server_without_models_runs_logs_the_reason_and_serves_models_loaded_later(
    tmp_path: Path, make: Callable[[Path], object], reason: str
) -> None:
    volume = tmp_path / "volume"
    make(volume)
    with (
        serving("--models", volume) as server,
        Client(server.target, timeout_s=60, healthy_only=False) as client,
    ):
        assert server.ready["event"] == "no model is served"
        assert health(server.target, "") == NOT_SERVING
        assert health(server.target, ALIVE) == SERVING
        assert server.page("/readyz") == (503, "not ready: no model is served\n")
        assert server.page("/healthz") == (200, "ok\n")
        assert reason in complaint(server)
        x = np.zeros((1, 1, 6, 5), np.float32)
        with pytest.raises(NotFoundError):
            client.denoise(x, model="zeros", sigma=1)
        fill(volume)
        assert run("els", "repository", "load", "zeros", "--target", server.target).returncode == 0
        assert health(server.target, "") == SERVING
        assert server.page("/readyz") == (200, "ok\n")
        assert health(server.target, "zeros") == SERVING
        client.denoise(x, model="zeros", sigma=1)
        server.terminate()
        assert server.wait() == (0, "")


def test_a_server_whose_models_are_all_invalid_runs_and_names_each_fault(tmp_path: Path) -> None:
    bad = {"bad": "kind: analytic\nmachine: x\n", "worse": "kind: ["}
    root = write_models(tmp_path / "models", bad)
    with serving("--models", root) as server:
        assert server.ready["event"] == "no model is served"
        assert health(server.target, "") == health(server.target, "bad") == NOT_SERVING
        records = [record for record in server.records() if record["level"] == "error"]
        assert [record["event"] for record in records] == [*["model refused"] * 2, *NOTHING]
        assert all(str(root / name / "model.yaml") in records[-1]["reason"] for name in bad)


def test_probes_have_a_port_in_plain_text_beside_tls_that_answers_health_alone(
    tmp_path: Path, models: Path
) -> None:
    certificates = Certificates(tmp_path)
    certificates.issue()
    with serving("--models", models, *certificates.options, ELS_HEALTH_PORT="0") as server:
        target = f"127.0.0.1:{server.ready['health_port']}"
        assert [health(target, name) for name in ("", ALIVE, "zeros")] == [SERVING] * 3
        with grpc.insecure_channel(target) as channel:
            ask = DenoiserServiceStub(channel).GetModel
            call = refused(lambda: ask(pb.GetModelRequest(name="zeros"), timeout=TIMEOUT_S))
            assert call.code() is grpc.StatusCode.UNIMPLEMENTED
        server.terminate()
        assert server.wait() == (0, "")
