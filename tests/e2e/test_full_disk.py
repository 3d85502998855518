"""A disk without room for the log, and files of models that did not fit on it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import grpc
import numpy as np
from safetensors.numpy import save_file
from tests.support.bad_requests import denoise
from tests.support.models_folder import DOCUMENTS, write_models
from tests.support.processes import ServerProcess, serving
from tests.support.refusals import TIMEOUT_S, assert_answers, refused

from els_client import Client
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceStub

FULL = Path("/dev/full")


def test_a_log_that_cannot_be_written_does_not_hinder_serving_nor_draining(models: Path) -> None:
    server = ServerProcess(FULL, "--models", models, "--threads", 1, "--log-level=debug")
    try:
        with grpc.insecure_channel(server.target) as channel:
            ask = DenoiserServiceStub(channel).Denoise
            for _ in range(20):
                assert_answers(channel)
                call = refused(partial(ask, denoise(labels=[9]), timeout=TIMEOUT_S))
                assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
        server.terminate()
        assert server.wait() == (0, "")
    finally:
        server.kill()


def test_files_that_are_cut_short_or_cannot_be_read_are_named_and_the_others_serve(
    tmp_path: Path,
) -> None:
    prior = "kind: gaussian\nshape: [1, 2, 2]\nmean: mean.safetensors\nvariance: 1.0\n"
    banks = {f"bank-{kept}": kept for kept in (0, 4, 100, -1)}
    bad = {"cut": prior, "folder": prior, "empty": "", "loop": ""} | {
        name: f"kind: analytic\nmachine: els\nbank: ../_banks/{name}.safetensors\n"
        for name in banks
    }
    root = write_models(tmp_path / "models", {"gaussian": DOCUMENTS["gaussian"], **bad})
    whole = (root / "_banks" / "tiny.safetensors").read_bytes()
    for name, kept in banks.items():
        (root / "_banks" / f"{name}.safetensors").write_bytes(whole[:kept])
    save_file({"mean": np.zeros((1, 2, 2))}, root / "cut" / "mean.safetensors")
    with (root / "cut" / "mean.safetensors").open("r+b") as file:
        file.truncate(80)
    (root / "folder" / "mean.safetensors").mkdir()
    (root / "loop" / "model.yaml").unlink()
    (root / "loop" / "model.yaml").symlink_to("model.yaml")
    with serving("--models", root) as server:
        with Client(server.target) as client:
            assert [model.name for model in client.models()] == ["gaussian"]
        refusals = [one for one in server.records() if one["event"] == "model refused"]
    assert {one["model"] for one in refusals} == set(bad)
    for refusal in refusals:
        name = refusal["model"]
        assert str(root / ("_banks" if name in banks else name)) in refusal["reason"]
        assert "exception" not in refusal
