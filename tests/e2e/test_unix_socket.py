"""A server on a socket of the file system, asked by every client of ours."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
from tests.e2e.processes import run, serving

from els_client import Client, UnauthenticatedError


def test_it_is_served_administered_and_loaded_there_and_gone_afterwards(
    models: Path, tmp_path: Path
) -> None:
    path = tmp_path / "els.sock"
    target, x = f"unix:{path}", np.zeros((1, 1, 6, 5), np.float32)
    with serving("--models", models, "--threads", 1, "--host", target) as server:
        assert server.ready["grpc_port"] == 0
        with Client(target) as client:
            assert client.denoise(x, model="zeros", sigma=1.0).shape == x.shape
            assert len(list(client.sample(model="zeros", steps=3))) == 3
            client.repository.load("zeros")
        bench = ("bench", "--model", "zeros", "--callers", 2, "--count", 20)
        done = run("els", "--target", target, *bench)
        assert done.returncode == 0, done.stderr
        # gRPC by itself would take the socket away from the living.
        second = run("els-server", "run", "--models", models, "--host", target, "--metrics-port=0")
        assert (second.returncode, second.stdout) == (2, "")
        assert f"{target}: cannot listen: Address already in use" in second.stderr
        server.terminate()
        assert server.wait() == (0, "")
    assert not path.exists()


def test_the_socket_of_a_server_that_died_is_taken_over(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "els.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with (
        serving("--models", models, "--threads", 1, "--host", f"unix:{path}"),
        Client(f"unix:{path}") as client,
    ):
        assert client.models()


def test_a_path_that_cannot_be_had_is_named_and_what_is_there_is_kept(
    models: Path, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    for path, why in ((file, "File exists"), (tmp_path / "no" / "x", "No such file"), ("", "")):
        options = ("--models", models, "--host", f"unix:{path}", "--metrics-port=0")
        done = run("els-server", "run", *options)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"unix:{path}: cannot listen: {why}" in done.stderr
        assert "Traceback" not in done.stderr
    assert file.read_text() == "precious"


def test_with_tokens_a_socket_asks_for_them_too(models: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(run("els-server", "token", "one", "--role", "infer").stdout)
    tokens.chmod(0o600)
    options = ("--host", f"unix:{tmp_path / 's'}", "--tokens", tokens)
    with (
        serving("--models", models, "--threads", 1, *options),
        Client(f"unix:{tmp_path / 's'}") as client,
        pytest.raises(UnauthenticatedError),
    ):
        client.models()
