"""Servers and shards forked from a process that has imported torch: two CPU seconds less for each.

What is imported beforehand does nothing on import, starts no thread, and does not import gRPC, so
that a forked server does the rest as one that was started by its command. ``tests/e2e`` starts some
servers by the command too.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import PIPE, TimeoutExpired
from types import ModuleType
from typing import IO, Any, BinaryIO

import pytest

from els_service.shards import local

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *("torch", "typer", "structlog", "prometheus_client"),
        *("els_service.config", "els_service.engine.engine", "els_service.repository"),
        *("els_service.cli.bank", "els_service.cli.calibrate", "els_proto.denoise.v1.denoise_pb2"),
        *("els_proto.inference.grpc_service_pb2", "google.protobuf.json_format"),
        *("els_service.shards.process", "tests.support.preloaded"),
        *("uvloop", "uvicorn", "uvicorn.protocols.http.h11_impl", "tests.support.frozen"),
    ]
)
"""Context of processes that begin with torch imported; tests compile kernels in such too."""


def _serve(
    environment: dict[str, str],
    script: str | None,
    arguments: list[str],
    log: str,
    stdout: Connection | None,
    session: bool,
) -> None:
    """Be the program: ``els-server``, or a Python script."""
    if session:
        os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    stderr = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(stderr, 2)
    os.dup2(stderr if stdout is None else stdout.fileno(), 1)
    os.close(stderr)
    if stdout is not None:
        stdout.close()
    sys.argv = [script or "els-server", *arguments]
    if script is None:
        from els_service.cli import main

        main()
    else:
        runpy.run_path(script, run_name="__main__")


class ForkedProcess:
    """Server process with the part of the interface of ``subprocess.Popen`` that tests use.

    Args:
        script: path of a Python script that runs instead of ``els-server``.
        arguments: of the command line.
        log: file for stderr, to which it is appended.
        environment: all variables of the process.
        piped: whether its stdout is ``stdout``; else it goes to the log.
        session: whether the process leads a session of its own.
    """

    def __init__(
        self,
        script: Path | None,
        arguments: Sequence[str],
        log: Path,
        environment: dict[str, str],
        *,
        piped: bool = True,
        session: bool = False,
    ) -> None:
        program = None if script is None else str(script), list(arguments), str(log)
        reader, writer = FORKS.Pipe(duplex=False)
        with reader, writer:
            given = environment, *program, writer if piped else None, session
            self._process = FORKS.Process(target=_serve, args=given)
            self._process.start()
            self.stdout: BinaryIO | None = None
            if piped:
                self.stdout = os.fdopen(os.dup(reader.fileno()), "rb")

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit code; negative for a signal, None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        # As subprocess has it, for a process that ends meanwhile.
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code.

        Raises:
            subprocess.TimeoutExpired: the process still runs.
        """
        self._process.join(timeout)
        if self.returncode is None:
            raise TimeoutExpired("els-server", timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[bytes, None]:
        """Wait for the end and return the rest of stdout.

        Raises:
            subprocess.TimeoutExpired: the process still runs.
        """
        self.wait(timeout)
        if self.stdout is None or self.stdout.closed:
            return b"", None
        with self.stdout:
            return self.stdout.read(), None


@contextmanager
def forked_by(*modules: ModuleType) -> Iterator[None]:
    """Have modules fork the ``els-server`` that they would execute with ``subprocess.Popen``."""

    def popen(
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        stdout: int | IO[Any],
        stderr: IO[Any],
        start_new_session: bool = False,
        **options: Any,
    ) -> ForkedProcess | subprocess.Popen[Any]:
        program, *arguments = map(str, command)
        if Path(program).name != "els-server" or options:
            return subprocess.Popen(
                command,
                env=env,
                stdout=stdout,
                stderr=stderr,
                start_new_session=start_new_session,
                **options,
            )
        return ForkedProcess(
            *(None, arguments, Path(stderr.name), dict(os.environ if env is None else env)),
            piped=stdout == PIPE,
            session=start_new_session,
        )

    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(module, "subprocess", _Forking(popen))
        yield


class _ForkedShard:
    """Process of a shard with the part of the interface of ``subprocess.Popen`` that it uses."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        pass_fds: Sequence[int],
        stdin: int,
        start_new_session: bool,
    ) -> None:
        assert (stdin, start_new_session) == (subprocess.DEVNULL, True)
        assert [*command[:-2]] == [sys.executable, "-m", "els_service.shards.process"], command
        ends = [Connection(os.dup(number)) for number in pass_fds]
        self._process = FORKS.Process(target=_be_shard, args=ends)
        self._process.start()
        for end in ends:
            end.close()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def kill(self) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode


def _be_shard(connection: Connection, memory: Connection) -> None:
    """Be the program ``python -m els_service.shards.process``."""
    from els_service.shards.process import main

    os.setsid()
    sys.argv = ["process", str(connection.fileno()), str(memory.fileno())]
    main()


@contextmanager
def forked_shards() -> Iterator[None]:
    """Have the shards of models that are loaded here forked, not executed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "subprocess", _Forking(_ForkedShard))
        yield


class _Forking(ModuleType):
    """``subprocess`` with another ``Popen``."""

    def __init__(self, popen: Any) -> None:
        super().__init__("subprocess")
        vars(self).update({**vars(subprocess), "Popen": popen})
