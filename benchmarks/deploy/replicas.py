"""Server processes like those of a cluster: separate addresses, one port, one name."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.deploy import names
from benchmarks.service.messages import MODEL, MODEL_YAML
from benchmarks.service.servers import free_port

START_S = 90.0
_DRAINED_S = 60.0
_SCRAPE_S = 2.0
_ANSWERED = re.compile(
    r'^grpc_server_handled_total{(?=[^}]*grpc_method="Denoise")(?=[^}]*grpc_code="OK")[^}]*} (\S+)',
    re.MULTILINE,
)
_TRAJECTORIES = re.compile(r"^els_trajectories(?:{[^}]*})? (\S+)", re.MULTILINE)


class Replica:
    """One server process on its own address; it can be restarted there.

    Args:
        address: loopback IPv4 address.
        command: command of the process.
        environment: environment of the process.
        log: file for its stderr.
    """

    def __init__(
        self, address: str, command: list[str], environment: dict[str, str], log: Path
    ) -> None:
        self.address = address
        self._command, self._environment, self._log = command, environment, log
        self._metrics = ""
        self.start()

    def start(self) -> None:
        """Start the process; ``wait_ready`` waits until it serves."""
        with self._log.open("ab") as stderr:
            self.process = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=stderr, env=self._environment
            )

    def wait_ready(self) -> None:
        """Wait until every model is served.

        Raises:
            RuntimeError: It exited, or is not ready in time.
        """
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], START_S)
        if not (readable and self.process.stdout.readline()):
            raise RuntimeError(f"{self.address} did not start: {self._log.read_text()[-2000:]}")

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        self.process.send_signal(number)

    def wait_ended(self) -> int:
        """Wait for the process and return its exit code."""
        code = self.process.wait(_DRAINED_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def answered(self) -> int:
        """Return the number of ``Denoise`` calls answered since the start."""
        return int(self._metric(_ANSWERED))

    def trajectories(self) -> int:
        """Return the number of trajectories in progress."""
        return int(self._metric(_TRAJECTORIES))

    def core_seconds(self) -> float:
        """Return the CPU time of its living threads in seconds, with nanosecond resolution."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9

    def _metric(self, pattern: re.Pattern[str]) -> float:
        port = next(part for part in self._command if part.startswith("--metrics-port="))
        url = f"http://{self.address}:{port.partition('=')[2]}/metrics"
        with urllib.request.urlopen(url, timeout=_SCRAPE_S) as response:
            return sum(map(float, pattern.findall(response.read().decode())))


@dataclass
class Fleet:
    """Replicas behind one name.

    Attributes:
        names: DNS server with the published replicas.
        port: port of every replica.
        grace_s: seconds for which a draining replica accepts new calls, as in ``deploy/base``.
        replicas: running replicas.
    """

    names: names.Names
    port: int
    metrics_port: int
    models: Path
    logs: Path
    grace_s: float
    replicas: list[Replica] = field(default_factory=list)
    _started: int = 0

    @property
    def target(self) -> str:
        """Target for a client that balances the load itself."""
        return f"{self.names.target}:{self.port}"

    def add(self) -> Replica:
        """Start a replica on a new address."""
        self._started += 1
        address = f"127.0.1.{self._started}"
        program = Path(sys.executable).with_name("els-server")
        options = (
            *("--models", self.models, "--host", address, "--threads=1"),
            *(f"--port={self.port}", f"--metrics-port={self.metrics_port}"),
        )
        kept = {name: value for name, value in os.environ.items() if not name.startswith("ELS_")}
        environment = {**kept, "ELS_GRACE_S": str(self.grace_s)}
        command = [str(program), "run", *map(str, options)]
        replica = Replica(address, command, environment, self.logs / f"{address}.log")
        self.replicas.append(replica)
        return replica

    def publish(self, *, without: Replica | None = None) -> None:
        """Publish the replicas under the name, except one that is removed."""
        self.names.addresses = tuple(
            replica.address for replica in self.replicas if replica is not without
        )

    def answered(self, pause_s: float) -> dict[str, int]:
        """Return the number of ``Denoise`` calls that each replica answers within ``pause_s``."""
        before = {replica.address: replica.answered() for replica in self.replicas}
        time.sleep(pause_s)
        return {
            replica.address: replica.answered() - before[replica.address]
            for replica in self.replicas
        }


@contextmanager
def fleet(count: int, *, grace_s: float = 5.0, models: Path | None = None) -> Iterator[Fleet]:
    """Yield ``count`` ready replicas, and stop them on exit.

    Args:
        count: number of replicas.
        grace_s: see ``Fleet.grace_s``; by default that of ``deploy/base``.
        models: folder of models; None for a single Gaussian model.
    """
    with tempfile.TemporaryDirectory() as folder, names.serving() as served:
        if models is None:
            models = Path(folder) / "models"
            (models / MODEL).mkdir(parents=True)
            (models / MODEL / "model.yaml").write_text(MODEL_YAML)
        found = Fleet(served, free_port(), free_port(), models, Path(folder), grace_s)
        try:
            for _ in range(count):
                found.add()
            for replica in found.replicas:
                replica.wait_ready()
            found.publish()
            yield found
        finally:
            for replica in found.replicas:
                replica.process.kill()
                replica.wait_ended()
