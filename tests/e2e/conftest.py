from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from tests.support import folded_models as folded
from tests.support.http_client import HttpClient
from tests.support.models_folder import write_models
from tests.support.processes import FAULT_SERVER, ServerProcess, serving
from tests.support.twin import Twin

from els_client import AsyncClient, Client
from els_service.denoisers.banks import save_bank


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models root of all kinds."""
    return write_models(tmp_path_factory.mktemp("world") / "models")


@pytest.fixture(scope="session")
def server(models: Path) -> Iterator[ServerProcess]:
    """One server process for all tests that leave it as they found it."""
    with serving("--models", models, "--threads", 1, "--http-port", 0) as process:
        yield process


@pytest.fixture(scope="session")
def http(server: ServerProcess) -> Iterator[HttpClient]:
    """Its HTTP port."""
    with HttpClient(server.ready["http_port"]) as client:
        yield client


@pytest.fixture(scope="module")
def unharmed(server: ServerProcess, http: HttpClient) -> Iterator[None]:
    """Check after the tests of a module that it answers, and logged no error."""
    before = len(server.records())
    yield
    assert http.get("/v2/models/zeros/ready").status == 200
    records = server.records()[before:]
    assert [record for record in records if record["level"] in ("warning", "error")] == []


@pytest.fixture(scope="session")
def folded_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of models with a fold and with queries of another size."""
    models = write_models(tmp_path_factory.mktemp("folded") / "models", folded.DOCUMENTS)
    save_bank(folded.mixed_bank(), models / "_banks" / "mixed.safetensors")
    limits = {"ELS_MAX_PIXELS": str(folded.MAX_PIXELS)}
    with serving("--models", models, "--threads", 1, **limits) as process:
        yield process


@pytest.fixture(scope="session")
def fault_server(models: Path) -> Iterator[ServerProcess]:
    """A second server, with a model of 20 ms an image and a short queue."""
    options = {"ELS_QUEUE_S": "2", "ELS_STARVATION_S": "0.3"}
    arguments = "--models", models, "--threads", 1, "--http-port", 0
    with serving(*arguments, program=FAULT_SERVER, **options) as process:
        yield process


@pytest.fixture(scope="session")
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    """A raw channel to it; of any size, so that the server's limit counts."""
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(server.target, options) as channel:
        yield channel


@pytest.fixture(scope="session")
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.target, timeout_s=60) as client:
        yield client


@pytest.fixture(params=[Client, AsyncClient], ids=["sync", "async"])
async def twin(request: pytest.FixtureRequest, server: ServerProcess) -> AsyncIterator[Twin]:
    twin = Twin(request.param(server.target))
    yield twin
    await twin.close()
