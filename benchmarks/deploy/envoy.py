"""A real Envoy with the configuration of ``deploy/envoy``, in front of a fleet."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deploy.envoy.render import Address, rendered

from benchmarks.deploy import names
from benchmarks.deploy.replicas import Fleet
from benchmarks.service.servers import free_port, running

_ROOT = Path(__file__).parents[2]
_START_S = 30.0


def program() -> str | None:
    """Return the path of Envoy: on PATH, or installed by ``make deploy-tools``."""
    return shutil.which("envoy") or shutil.which(_ROOT / ".venv-deploy" / "bin" / "envoy")


@contextmanager
def in_front_of(fleet: Fleet) -> Iterator[str]:
    """Yield the address of an Envoy in front of the fleet, once all replicas are healthy.

    Raises:
        RuntimeError: Envoy is not installed, or does not start.
    """
    envoy = program()
    if envoy is None:
        raise RuntimeError("expected envoy: make deploy-tools")
    listen, admin = Address("127.0.0.1", free_port()), Address("127.0.0.1", free_port())
    text = rendered(
        listen=listen,
        admin=admin,
        servers=[Address(names.NAME, fleet.port)],
        resolver=Address("127.0.0.1", fleet.names.port),
    )
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "envoy.yaml"
        config.write_text(text)
        options = ("--concurrency", "1", "--base-id", str(listen.port), "--log-level", "warning")
        command = (envoy, "-c", str(config), *options)
        with running(command, listen.port):
            _wait_healthy(admin, len(fleet.replicas))
            yield f"{listen.host}:{listen.port}"


def _wait_healthy(admin: Address, count: int) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        with suppress(OSError):
            url = f"http://{admin.host}:{admin.port}/stats?filter=denoisers.membership_healthy"
            with urllib.request.urlopen(url, timeout=1.0) as response:
                if response.read().split() == [
                    b"cluster.denoisers.membership_healthy:",
                    b"%d" % count,
                ]:
                    return
        time.sleep(0.1)
    raise RuntimeError(f"envoy did not find {count} healthy servers within {_START_S} s")


def check(config: str) -> str:
    """Return Envoy's errors and deprecation warnings for a configuration."""
    envoy = program()
    assert envoy is not None
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(config)
        file.flush()
        command = (envoy, "--mode", "validate", "--log-level", "warning", "-c", file.name)
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.stderr
