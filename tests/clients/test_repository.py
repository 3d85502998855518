"""What an operator does, with both clients and on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.fake_server import FakeDenoiser, FakeRepository, served
from tests.support.twin import Twin
from typer.testing import CliRunner, Result

from els_client import (
    AsyncClient,
    Client,
    ElsError,
    PermissionDeniedError,
    RepositoryModel,
    Statistics,
    UnauthenticatedError,
)
from els_client.cli import app

TORN = RepositoryModel(name="torn", version="1", state="UNAVAILABLE", reason="no bank")
STATISTICS = Statistics(
    name="fashion-els",
    version="3",
    images=7,
    batches=2,
    answered=5,
    failed=1,
    queued_s=1.5,
    computed_s=2.5,
)


@pytest.fixture
def repository() -> FakeRepository:
    # The methods that it lacks answer UNIMPLEMENTED: so says the class that it comes from.
    return FakeRepository()  # type: ignore[abstract]


@pytest.fixture
def target(repository: FakeRepository) -> Iterator[str]:
    with served(FakeDenoiser(), repository) as address:
        yield address


@pytest.fixture
def admin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("admin\n")
    monkeypatch.setenv("ELS_TOKEN_FILE", str(tmp_path / "token"))


async def test_an_operator_sees_loads_and_unloads_models(
    kind: type[Client] | type[AsyncClient], target: str, repository: FakeRepository
) -> None:
    twin = Twin(kind(target, token="admin"))
    served_model, torn = await twin.operate("index")
    assert (served_model.name, served_model.version, served_model.state) == (
        "fashion-els",
        "3",
        "READY",
    )
    assert torn == TORN
    assert await twin.operate("index", ready=True) == [served_model]
    assert await twin.operate("statistics", "fashion-els") == [STATISTICS]
    await twin.operate("load", "fashion-els")
    await twin.operate("unload", "fashion-els")
    assert repository.done == [("load", "fashion-els"), ("unload", "fashion-els")]
    with pytest.raises(ElsError, match="torn: no bank"):
        await twin.operate("load", "torn")
    assert await twin.operate("log_level") == "info"
    assert await twin.operate("log_level", "debug") == "debug"
    await twin.close()


async def test_who_may_not_operate_is_told_so(
    kind: type[Client] | type[AsyncClient], target: str
) -> None:
    for token, error in ((None, UnauthenticatedError), ("guest", PermissionDeniedError)):
        twin = Twin(kind(target, token=token))
        with pytest.raises(error):
            await twin.operate("load", "fashion-els")
        await twin.close()


def els(*args: str) -> Result:
    return CliRunner().invoke(app, args, catch_exceptions=False)


@pytest.mark.usefixtures("admin")
@pytest.mark.slow
def test_the_command_line_operates_too(target: str, repository: FakeRepository) -> None:
    table = els("--target", target, "repository", "index").stdout
    assert all(text in table for text in ("fashion-els", "READY", "torn", "no bank"))
    listed = json.loads(els("repository", "index", "--target", target, "--json").stdout)
    assert listed[0]["statistics"]["computed_s"] == 2.5
    assert listed[1]["statistics"] is None
    assert els("--target", target, "repository", "load", "fashion-els").exit_code == 0
    assert els("--target", target, "repository", "unload", "fashion-els").exit_code == 0
    assert repository.done == [("load", "fashion-els"), ("unload", "fashion-els")]
    assert els("--target", target, "repository", "load", "torn").exit_code == 1
    assert els("--target", target, "log-level").stdout == "info\n"
    assert els("--target", target, "log-level", "warning").stdout == "warning\n"


def test_who_may_not_operate_has_an_exit_code_of_its_own(target: str) -> None:
    refused = els("--target", target, "log-level")
    assert refused.exit_code == 7
    assert refused.stderr == "els: a bearer token is needed\n"
