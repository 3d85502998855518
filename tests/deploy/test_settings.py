"""The ConfigMap is what the typed settings say, and what the server itself accepts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from deploy import settings as written
from tests.deploy.manifests import (
    COMMAND,
    Combination,
    each_combination,
    environment,
    needs_kubectl,
)
from tests.support.security import Certificates
from typer.testing import CliRunner

from els_service.cli.main import app
from els_service.server.security.tokens import new_token


@pytest.fixture(autouse=True)
def _no_settings_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("ELS_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the Secrets hold, laid out as they are mounted."""
    root = tmp_path_factory.mktemp("etc")
    (root / "tls").mkdir()
    Certificates(root / "tls").issue()
    (root / "tokens").mkdir()
    _, entry = new_token("ci", "infer")
    (root / "tokens" / "tokens.yaml").write_text(f"[{entry.model_dump_json()}]")
    return root


def check(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> tuple[int, str]:
    """Return the exit code of the init container's command and what it says."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, list(COMMAND[1:]))
    return result.exit_code, result.output


def test_the_file_is_what_the_settings_say_today() -> None:
    assert written.FILE.read_text() == written.render(), "run python -m deploy.settings"


@pytest.mark.parametrize("name", ["ELS_GRACE", "els_grace_s"])
def test_a_key_that_no_setting_has_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    code, text = check(monkeypatch, {name: "5", "ELS_GRACE_S": "5"})
    assert (code, text) == (2, f"els-server: {name}: expected names of settings, got others\n")


def test_the_base_alone_is_refused_as_nothing_encrypts(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {f"ELS_{name.upper()}": str(value) for name, value in written.CHOSEN.items()}
    code, text = check(monkeypatch, chosen)
    assert code == 2
    assert "host: expected loopback, or tls_certificate and tls_key" in text


@needs_kubectl
@each_combination
def test_the_server_accepts_the_settings_of_every_combination(
    combination: Combination, secrets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = environment(combination)
    here = {name: value.replace("/etc/els", str(secrets)) for name, value in variables.items()}
    code, text = check(monkeypatch, here)
    if "cuda" in variables.values() and not torch.cuda.is_available():
        assert (code, "device: expected a CUDA device" in text) == (2, True)
    else:
        assert (code, text) == (0, "configuration: ok\n")
