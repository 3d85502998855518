"""``els-server check`` and the refusals of ``els-server run``: every fault named, exit code 2."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.e2e.models_folder import DOCUMENTS, write_models
from typer.testing import CliRunner, Result

from els_service.cli.main import app
from els_service.version import COMMIT, VERSION


@pytest.fixture(autouse=True)
def _no_settings_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("ELS_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text("prot: 1\nthreads: 0\n")
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_version_tells_version_and_commit() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"els-server {VERSION} ({COMMIT})\n")


def test_check_tells_the_state_of_every_model(tmp_path: Path) -> None:
    root = write_models(tmp_path / "models")
    result = run("check", "--models", root)
    assert (result.exit_code, result.stderr) == (0, "")
    first, *lines = result.stdout.splitlines()
    assert first == "configuration: ok"
    assert [line.partition(":")[0] for line in lines] == sorted(DOCUMENTS)
    assert "zeros: ok, analytic els" in lines


def test_check_of_the_bundled_models_finds_no_fault() -> None:
    result = run("check")
    assert (result.exit_code, result.stderr) == (0, "")
    assert len(result.stdout.splitlines()) == 1 + 5


def test_check_names_each_model_that_is_refused_and_why(tmp_path: Path) -> None:
    bad = {"bad": "kind: magic\n", "worse": "kind: [", "zeros": DOCUMENTS["zeros"]}
    root = write_models(tmp_path / "models", bad)
    result = run("check", "--models", root)
    assert result.exit_code == 2
    assert "zeros: ok" in result.stdout
    for name in ("bad", "worse"):
        (line,) = (line for line in result.stderr.splitlines() if line.startswith(f"{name}: "))
        assert str(root / name / "model.yaml") in line


def test_check_of_a_folder_without_models_is_a_fault(tmp_path: Path) -> None:
    result = run("check", "--models", tmp_path)
    assert result.exit_code == 2
    assert f"{tmp_path}: expected a folder NAME/model.yaml, found none" in result.stderr


def test_check_of_a_folder_that_is_not_there_is_a_fault(tmp_path: Path) -> None:
    result = run("check", "--models", tmp_path / "none")
    assert result.exit_code == 2
    assert f"{tmp_path / 'none'}: expected a folder of models" in result.stderr


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_configuration_that_is_wrong_is_named_with_every_fault(
    config: Path, command: str
) -> None:
    result = run(command, "--config", config)
    assert (result.exit_code, result.stdout) == (2, "")
    for fault in (str(config), "prot: extra inputs are not permitted", "threads: "):
        assert fault in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (("--port", 70000), "port: input should be less than or equal to 65535, got 70000"),
        (("--device", "abacus"), "device: input should be 'auto', 'cpu' or 'cuda'"),
        (("--log-level", "loud"), "log_level: "),
        (("--threads", 0), "threads: "),
        (("--config", "/nowhere.yaml"), "/nowhere.yaml: expected a readable file"),
    ],
)
def test_a_flag_that_is_wrong_is_named(options: tuple[str, object], fault: str) -> None:
    result = run("run", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert fault in result.stderr


def test_check_of_the_configuration_alone_leaves_out_the_models(
    tmp_path: Path, config: Path
) -> None:
    sound = run("check", "--config-only", "--models", tmp_path / "none")
    assert (sound.exit_code, sound.stdout) == (0, "configuration: ok\n")
    assert run("check", "--config-only", "--config", config).exit_code == 2
