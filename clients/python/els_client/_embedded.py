"""A server of one photograph, for as long as one command runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import IO, Any

from PIL import Image

from els_client import _pictures as pictures
from els_client._client import Client
from els_client.errors import ElsError, InvalidArgumentError, UnavailableError

NAME = "photo"
"""Name of the model."""
_PROGRAM = """
import ctypes, signal, sys
libc = ctypes.CDLL(None)
if hasattr(libc, "prctl"):
    libc.prctl(1, signal.SIGTERM)
from els_service.cli import main
main()
"""
# PR_SET_PDEATHSIG: on Linux the server drains even if this process is killed. -P: no module of the
# working folder is imported.
SERVER = (
    *(sys.executable, "-P", "-c", _PROGRAM, "run"),
    *("--host=127.0.0.1", "--port=0", "--metrics-port=0"),
)
_NEEDED = ("els_service", "torch")
"""Packages without which no server starts."""
_SIGNALS = ("SIGTERM", "SIGHUP")
_START_S = 120
_STOP_S = 10
_LOG_END = 2000
"""Characters of the log in an error."""


@contextmanager
def serving(photo: Image.Image, keys: Mapping[str, int | str]) -> Iterator[str]:
    """Yield the address of a server process whose model ``NAME`` draws from a photograph.

    It listens on a free port of 127.0.0.1. Server and files are gone afterwards, also after an
    error, Ctrl-C or SIGTERM.

    Args:
        photo: Grey or RGB.
        keys: Of the model, beside its kind and pictures.

    Raises:
        UnavailableError: The packages of the server are not installed, or it does not start.
        InvalidArgumentError: It rejects the photograph or a key; the text is its reason.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise UnavailableError(
            f"expected a server: install one (pip install 'els-denoise[server]', which has "
            f"{' and '.join(missing)}), or give the address of another with --target"
        )
    with ExitStack() as stack:
        stack.enter_context(_ended_by_signals())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="els-remix-")))
        models = folder / "models"
        _write_model(models / NAME, photo, keys)
        log = stack.enter_context((folder / "log").open("w+b"))
        server = stack.enter_context(_process(models, log))
        port = _port_of(server, log)
        yield f"127.0.0.1:{port}"


def _write_model(folder: Path, photo: Image.Image, keys: Mapping[str, int | str]) -> None:
    folder.mkdir(parents=True)
    # Without compression, which would take longer than the rest for a large photograph.
    pictures.save(photo, folder / "photo.ppm")
    document = {"kind": "picture", "pictures": ["photo.ppm"], **keys}
    # JSON is valid YAML.
    (folder / "model.yaml").write_text(json.dumps(document), encoding="utf-8")


@contextmanager
def _process(models: Path, log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a server process, which is drained afterwards, or killed if that takes too long."""
    # Settings of another server, such as its tokens, are not those of this one.
    env = {name: value for name, value in os.environ.items() if not name.startswith("ELS_")}
    command = [*SERVER, "--models", str(models)]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        env={**env, "ELS_GRACE_S": "0"},
        # Ctrl-C reaches all processes of the terminal's group: this one ends the server.
        start_new_session=True,
    ) as server:
        try:
            yield server
        finally:
            server.terminate()
            try:
                server.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                server.kill()


def _port_of(server: subprocess.Popen[bytes], log: IO[bytes]) -> int:
    """Return the port of a server when it is ready.

    Raises:
        UnavailableError: It ended, or was not ready in time.
        InvalidArgumentError: It cannot load the model.
    """
    assert server.stdout is not None
    alarm = threading.Timer(_START_S, server.kill)
    # A signal may come before it is cancelled: then the process does not wait for it.
    alarm.daemon = True
    alarm.start()
    try:
        line = server.stdout.readline()
    finally:
        alarm.cancel()
    if not line:
        code = server.wait()
        log.seek(0)
        text = log.read().decode(errors="replace")[-_LOG_END:]
        raise UnavailableError(f"the server ended with exit code {code}; its log ends: {text}")
    ready: dict[str, Any] = json.loads(line)
    port = int(ready["grpc_port"])
    if ready["event"] != "ready":
        raise InvalidArgumentError(f"the server rejects the photograph: {_reason(port)}")
    return port


def _reason(port: int) -> str:
    """Return why a server cannot load its model."""
    try:
        # It is not healthy without a model.
        with Client(f"127.0.0.1:{port}", timeout_s=_STOP_S, healthy_only=False) as client:
            reasons = [one.reason for one in client.repository.index() if one.reason]
            # Not the name of a file that is gone when it is read.
            return "; ".join(reason.rpartition("/model.yaml: ")[2] for reason in reasons)
    except ElsError as error:
        return str(error)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end this process by an exception, so that it cleans up."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Only the main thread may set handlers.
        return

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
    # One that is ignored, as nohup has it, stays ignored.
    taken = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
