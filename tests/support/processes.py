"""Real processes of ``els-server`` and ``els``."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from tests.support.preloaded import ForkedProcess

BIN = Path(sys.executable).parent
SERVER: tuple[object, ...] = ()
"""``els-server``, forked from a process that has imported torch."""
COMMAND = (BIN / "els-server",)
"""``els-server``, executed as a person starts it."""
FAULT_SERVER = (sys.executable, Path(__file__).with_name("fault_server.py"))
"""``els-server`` with the models of ``fault_server``; forked too."""
START_S = 60
"""Ample: two busy cores take a few seconds."""


def environment(**variables: str) -> dict[str, str]:
    """Return this environment without settings of ours, and with these variables."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ELS_")}
    return {**kept, **variables}


def run(
    command: str | Path, *arguments: object, timeout_s: float = 60, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end.

    Args:
        command: ``els``, or ``els-server``, which is forked like ``SERVER``; ``COMMAND[0]`` is
            executed.
        arguments: of the command line.
        timeout_s: Seconds that it may take.
        variables: of the environment; if others than settings are among them, the command is
            executed.
    """
    given, env = [*map(str, arguments)], environment(**variables)
    if command == "els-server" and _are_settings(variables):
        return _run_forked(None, given, env, timeout_s)
    return subprocess.run(
        [BIN / command, *given],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=env,
        check=False,
    )


def run_script(
    script: Path, *arguments: object, timeout_s: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run a Python script to its end, forked like ``SERVER``: torch is imported already."""
    return _run_forked(script, [*map(str, arguments)], environment(), timeout_s)


def printed(program: str, folder: Path, *arguments: object) -> str:
    """Return what a Python program writes to stdout, run like ``run_script`` from a folder."""
    script = folder / "program.py"
    script.write_text(program)
    done = run_script(script, *arguments, timeout_s=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _are_settings(variables: Iterable[str]) -> bool:
    """Return whether none of these variables can matter when torch is imported."""
    return all(name.startswith("ELS_") for name in variables)


def _run_forked(
    script: Path | None, arguments: list[str], env: dict[str, str], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "stderr"
        process = ForkedProcess(script, arguments, log, env)
        try:
            stdout, _ = process.communicate(timeout_s)
        finally:
            process.kill()
        assert process.returncode is not None
        return subprocess.CompletedProcess(
            [str(script or "els-server"), *arguments],
            process.returncode,
            stdout.decode(),
            log.read_text(),
        )


class ServerProcess:
    """``els-server run`` on free ports; its stdout is piped, its stderr goes to a file.

    ``ELS_GRACE_S`` is 0 by default.

    Args:
        log: file for stderr.
        options: of ``run``; they replace ``--port=0 --metrics-port=0``.
        program: ``SERVER``, ``COMMAND`` or ``FAULT_SERVER``.
        variables: of the environment; if others than settings are among them, which may matter
            when torch is imported, the program is executed.
    """

    def __init__(
        self,
        log: Path,
        *options: object,
        program: Sequence[object] = SERVER,
        **variables: str,
    ) -> None:
        self._log = log
        arguments = ["run", "--port=0", "--metrics-port=0", *map(str, options)]
        env = environment(**{"ELS_GRACE_S": "0", **variables})
        self.process: ForkedProcess | subprocess.Popen[bytes]
        if program != COMMAND and _are_settings(variables):
            script = Path(str(program[-1])) if program else None
            self.process = ForkedProcess(script, arguments, log, env)
        else:
            with log.open("wb") as stderr:
                self.process = subprocess.Popen(
                    [*map(str, program or COMMAND), *arguments],
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    env=env,
                )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.kill()
        assert line, f"the server died: {log.read_text()}"
        self.ready: dict[str, Any] = json.loads(line)

    @property
    def target(self) -> str:
        """Address of the gRPC port."""
        return f"127.0.0.1:{self.ready['grpc_port']}"

    @property
    def metrics_url(self) -> str:
        """Where the metrics are."""
        return f"http://127.0.0.1:{self.ready['metrics_port']}/metrics"

    def page(self, path: str) -> tuple[int, str]:
        """Return status and text of a page of the port of metrics."""
        return page(self.ready["metrics_port"], path)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float = 30) -> tuple[int, str]:
        """Return exit code and what else came to stdout."""
        rest, _ = self.process.communicate(timeout=timeout_s)
        assert self.process.returncode is not None
        return self.process.returncode, rest.decode()

    def records(self) -> list[dict[str, Any]]:
        """Return the log so far; every line must be JSON, but for one that is being written."""
        complete, _, _ = self._log.read_text().rpartition("\n")
        return [json.loads(line) for line in complete.splitlines()]

    def kill(self) -> None:
        """End it, whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


def page(port: int, path: str) -> tuple[int, str]:
    """Return status and text of a page."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


@contextmanager
def serving(
    *options: object, program: Sequence[object] = SERVER, **variables: str
) -> Iterator[ServerProcess]:
    """Yield a server process that is ready, and kill it afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        server = ServerProcess(log, *options, program=program, **variables)
        try:
            yield server
        finally:
            server.kill()
