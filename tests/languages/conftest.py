"""Clients in other languages against a server, run by ``make languages``, which builds them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.models_folder import DOCUMENTS, write_models
from tests.support.processes import FAULT_SERVER, ServerProcess, serving

from els_client import Client

ROOT = Path(__file__).parents[2]
BUILT = ("typescript/build/main.js", "java/build/.compiled", "go/build/denoise")
# Collected once all are built, so that the tests of development neither need nor skip them.
collect_ignore_glob = (
    [] if all((ROOT / "clients" / path).exists() for path in BUILT) else ["test_*.py"]
)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of an ELS machine, and of ``slow``, which predicts 20 ms for an image."""
    models = write_models(
        tmp_path_factory.mktemp("languages") / "models", {"zeros": DOCUMENTS["zeros"]}
    )
    with serving("--models", models, "--threads", 1, program=FAULT_SERVER) as process:
        yield process


@pytest.fixture(scope="session")
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.target, timeout_s=60) as client:
        yield client
