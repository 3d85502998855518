"""Servers forked from a process that has imported torch: each starts two CPU seconds sooner.

What is imported beforehand does nothing on import, starts no thread, and does not import gRPC, so
that a forked server does the rest as one that was started by its command. ``tests/e2e`` starts some
servers by the command too.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import TimeoutExpired
from typing import BinaryIO

_FORKS = get_context("forkserver")
_FORKS.set_forkserver_preload(["torch", "typer", "els_service.config", "els_service.engine.engine"])


def _serve(
    environment: dict[str, str],
    script: str | None,
    arguments: list[str],
    log: str,
    stdout: Connection,
) -> None:
    """Be the program: ``els-server``, or a Python script."""
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(stdout.fileno(), 1)
    stdout.close()
    stderr = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(stderr, 2)
    os.close(stderr)
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
        log: file for stderr.
        environment: all variables of the process.
    """

    def __init__(
        self, script: Path | None, arguments: Sequence[str], log: Path, environment: dict[str, str]
    ) -> None:
        reader, writer = _FORKS.Pipe(duplex=False)
        with reader, writer:
            given = (None if script is None else str(script), list(arguments), str(log), writer)
            self._process = _FORKS.Process(target=_serve, args=(environment, *given))
            self._process.start()
            self.stdout: BinaryIO = os.fdopen(os.dup(reader.fileno()), "rb")

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
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[bytes, None]:
        """Wait for the end and return the rest of stdout.

        Raises:
            subprocess.TimeoutExpired: the process still runs.
        """
        self._process.join(timeout)
        if self.poll() is None:
            raise TimeoutExpired("els-server", timeout or 0)
        rest = b"" if self.stdout.closed else self.stdout.read()
        self.stdout.close()
        return rest, None
