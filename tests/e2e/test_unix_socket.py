"""A server on a Unix socket, called by every client of the project."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.processes import run, serving

from els_client import Client, UnauthenticatedError


def test_a_unix_socket_serves_calls_and_administration_and_is_removed_at_the_end(
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


def test_a_path_that_cannot_be_bound_is_named_and_its_file_is_kept(
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


def test_a_unix_socket_requires_tokens_if_there_are_any(models: Path, tmp_path: Path) -> None:
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


NOBODY = 65534
AS_NOBODY = f"""
import os, sys
if not os.getuid():
    os.setgroups([])
    os.setgid({NOBODY})
    os.setuid({NOBODY})
"""
BIND = """
import grpc
from concurrent.futures import ThreadPoolExecutor
from els_service.errors import LoadError
from els_service.server.addresses import bind
server = grpc.server(ThreadPoolExecutor(1))
"""
TRY = """
try:
    bind(server.add_insecure_port, "unix:" + sys.argv[1], 0)
    print("bound")
except LoadError as error:
    print(error)
"""
CONNECT = """
print(socket.socket(socket.AF_UNIX).connect_ex(sys.argv[1]))
"""
"""Steps of programs, which import before they are nobody: who tests may keep Python to himself."""


def output_of(*steps: str, path: Path, **options: Any) -> str:
    """Return what a program of these steps prints about a path."""
    command = [sys.executable, "-c", "\n".join(("import socket, sys", *steps)), str(path)]
    return str(subprocess.check_output(command, text=True, timeout=60, **options)).strip()


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that any user may look into, unlike those of ``tmp_path``."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o755), (0o077, 0o700), (0o117, 0o660)])
def test_the_umask_determines_who_may_connect(shared: Path, umask: int, mode: int) -> None:
    path = shared / "s"
    look = "import os\nprint(oct(os.stat(sys.argv[1]).st_mode & 0o777))"
    assert output_of(BIND, TRY, look, path=path, umask=umask).split() == ["bound", oct(mode)]


def test_a_path_without_write_permission_is_rejected_with_the_systems_reason(shared: Path) -> None:
    for name, mode in (("unwritable", 0o555), ("unsearchable", 0o600)):
        folder = shared / name
        folder.mkdir()
        folder.chmod(mode)
        found = output_of(BIND, AS_NOBODY, TRY, path=folder / "s")
        assert found == f"unix:{folder / 's'}: cannot listen: Permission denied"
        folder.chmod(0o755)
        assert list(folder.iterdir()) == []


@pytest.mark.skipif(os.getuid() != 0, reason="needs a second user")
def test_another_user_can_neither_connect_nor_take_a_living_socket_away(
    models: Path, shared: Path
) -> None:
    folder = shared / "all"
    folder.mkdir()
    folder.chmod(0o777)
    path = folder / "s"
    with (
        serving("--models", models, "--threads", 1, "--host", f"unix:{path}"),
        Client(f"unix:{path}") as client,
    ):
        assert output_of(AS_NOBODY, CONNECT, path=path) == str(errno.EACCES)
        found = output_of(BIND, AS_NOBODY, TRY, path=path)
        assert found == f"unix:{path}: cannot listen: Permission denied"
        assert client.models()


def test_a_socket_whose_server_is_too_busy_to_answer_is_left_to_it(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(str(path))
        busy.listen(0)
        waiting.connect(str(path))
        found = output_of(BIND, TRY, path=path)
        assert found == f"unix:{path}: cannot listen: Address already in use"
        assert path.exists()


def test_a_socket_of_another_kind_is_left_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        assert "cannot listen: Protocol wrong type" in output_of(BIND, TRY, path=path)
        assert path.exists()
