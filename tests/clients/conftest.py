from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from tests.support.fake_server import FakeDenoiser, served
from tests.support.twin import Twin

from els_client import AsyncClient, Client


@pytest.fixture
def fake() -> FakeDenoiser:
    return FakeDenoiser()


@pytest.fixture
def target(fake: FakeDenoiser) -> Iterator[str]:
    with served(fake) as address:
        yield address


@pytest.fixture(params=[Client, AsyncClient], ids=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> type[Client] | type[AsyncClient]:
    kind: type[Client] | type[AsyncClient] = request.param
    return kind


@pytest.fixture
async def twin(kind: type[Client] | type[AsyncClient], target: str) -> AsyncIterator[Twin]:
    twin = Twin(kind(target))
    yield twin
    await twin.close()
