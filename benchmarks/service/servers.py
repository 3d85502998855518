"""Server processes on loopback, each in a session of its own that is ended by its id."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.service.messages import MODEL, MODEL_YAML

PROGRAM = Path(sys.executable).with_name("els-server")

_STOP_S = 10.0


@dataclass(frozen=True)
class Running:
    """A server process, leader of its session, and its port."""

    pid: int
    port: int
    log: Path

    def cpu_seconds(self) -> float:
        """Return the CPU seconds of the session's living processes."""
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(FileNotFoundError, ProcessLookupError):
                # The name, in parentheses, may contain spaces; field 3 follows it.
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[3]) == self.pid:
                    ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    """Return a port of 127.0.0.1 that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def running(
    command: Sequence[str | Path], port: int, environment: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """Yield a running server; ends every process of its session on exit.

    Args:
        command: command of a server that listens on 127.0.0.1:``port``.
        port: free port.
        environment: its variables; None for those of this process.
    """
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        server = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            yield Running(server.pid, port, Path(log.name))
        except BaseException as error:
            if text := Path(log.name).read_text():
                error.add_note(f"end of the log of {command[0]}: {text[-2000:]}")
            raise
        finally:
            # The leader first, so that it can end its children.
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(_STOP_S)
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


@contextmanager
def els_server(*options: str, program: Path = PROGRAM) -> Iterator[Running]:
    """Yield the server with one Gaussian model and default settings but for the options.

    Args:
        options: of the command, such as ``--http-port=8080``.
        program: ``els-server`` of this build or of another.
    """
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / MODEL
        folder.mkdir()
        (folder / "model.yaml").write_text(MODEL_YAML)
        port = free_port()
        arguments = ["run", "--models", root, f"--port={port}", "--metrics-port=0", *options]
        with running((program, *arguments), port) as server:
            yield server


@contextmanager
def els_server_with_http() -> Iterator[tuple[Running, int]]:
    """Yield ``els_server`` and its HTTP port."""
    port = free_port()
    with els_server(f"--http-port={port}") as server:
        yield server, port


@contextmanager
def baselines() -> Iterator[Running]:
    """Yield a server of bare handlers."""
    port = free_port()
    with running((sys.executable, "-m", "benchmarks.service.baselines", str(port)), port) as server:
        yield server
