"""``els-server probe`` beside real servers: plain, TLS, the port of health, without models."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.models_folder import write_models
from tests.support.processes import ServerProcess, run, serving
from tests.support.security import Certificates

pytestmark = pytest.mark.slow

UNHEALTHY, FAULT = 1, 2


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def plain(models: Path) -> Iterator[ServerProcess]:
    with serving("--models", models) as server:
        yield server


def probe(*options: str, **variables: str) -> tuple[int, str]:
    """Return the exit code and what was said, on stdout and stderr."""
    done = run("els-server", "probe", *options, timeout_s=60, **variables)
    return done.returncode, done.stdout.strip() + done.stderr.strip()


@pytest.mark.e2e
def test_a_server_that_serves_is_healthy_and_each_of_its_models(plain: ServerProcess) -> None:
    port = str(plain.ready["grpc_port"])
    assert probe(ELS_PORT=port) == (0, "SERVING")
    assert probe("--service=zeros", ELS_PORT=port, ELS_HOST="0.0.0.0") == (0, "SERVING")
    # A proxy of the environment is no way to this machine.
    proxied = dict.fromkeys(("grpc_proxy", "https_proxy", "http_proxy"), "http://127.0.0.1:1")
    assert probe(ELS_PORT=port, **proxied) == (0, "SERVING")
    code, said = probe("--service=nobody", ELS_PORT=port)
    assert (code, said.partition(":")[0]) == (UNHEALTHY, "NOT_FOUND")


@pytest.mark.e2e
def test_the_certificate_is_the_servers_own_whatever_names_it_bears(
    models: Path, tmp_path: Path
) -> None:
    certificates, other = Certificates(tmp_path), Certificates(tmp_path / "other")
    other.folder.mkdir()
    other.issue()
    pair = certificates.authority.issue_cert("*.els.example.com")
    certificates.key.write_bytes(pair.private_key_pem.bytes())
    certificates.certificate.write_bytes(pair.cert_chain_pems[0].bytes())
    certificates.client_ca.write_bytes(certificates.authority.cert_pem.bytes())
    asked = {"ELS_TLS_CLIENT_CA": str(certificates.client_ca)}
    with serving("--models", models, *certificates.options, **asked) as server:
        port = str(server.ready["grpc_port"])

        def with_pair(held: Certificates) -> tuple[int, str]:
            files = {"CERTIFICATE": held.certificate, "KEY": held.key}
            return probe(ELS_PORT=port, **{f"ELS_TLS_{k}": str(v) for k, v in files.items()})

        assert with_pair(certificates) == (0, "SERVING")
        code, said = with_pair(other)
        assert (code, said.partition(":")[0]) == (UNHEALTHY, "UNAVAILABLE")


@pytest.mark.e2e
def test_without_models_the_process_is_alive_and_the_server_is_not_healthy(tmp_path: Path) -> None:
    with serving("--models", tmp_path, ELS_HEALTH_PORT="0") as server:
        # As TLS would have it: of the gRPC port nothing is asked.
        variables = {"ELS_HEALTH_PORT": str(server.ready["health_port"]), "ELS_PORT": "0"}
        assert probe(**variables) == (UNHEALTHY, "NOT_SERVING")
        assert probe("--service=grpc.health.v1.Health", **variables) == (0, "SERVING")


def test_nobody_there_and_somebody_silent_are_unhealthy_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = str(silent.getsockname()[1])
        code, said = probe("--timeout=0.3", ELS_PORT=port)
        assert (code, said.partition(":")[0]) == (UNHEALTHY, "DEADLINE_EXCEEDED")
    code, said = probe(ELS_PORT=port)
    assert (code, said.partition(":")[0]) == (UNHEALTHY, "UNAVAILABLE")


def test_a_port_that_nobody_can_know_is_a_fault() -> None:
    code, said = probe(ELS_PORT="0")
    assert code == FAULT
    assert said == "els-server: port: expected the port of the server, got 0 (any)"


def test_it_loads_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, els_service.cli.probe, els_service.server.probe;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_time_to_wait_that_is_no_number_is_refused() -> None:
    for given in ("nan", "inf"):
        code, said = probe("--timeout", given, ELS_PORT="1")
        assert code == FAULT
        assert "timeout" in said
