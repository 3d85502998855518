"""``els-server check`` and the refusals of ``els-server run``: every fault named, exit code 2."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.support.models_folder import DOCUMENTS, write_models
from tests.support.processes import run_script
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


@pytest.mark.alone
def test_check_tells_the_state_of_every_model(tmp_path: Path) -> None:
    root = write_models(tmp_path / "models")
    result = run("check", "--models", root)
    assert (result.exit_code, result.stderr) == (0, "")
    first, *lines = result.stdout.splitlines()
    assert first == "configuration: ok"
    assert [line.partition(":")[0] for line in lines] == sorted(DOCUMENTS)
    assert "zeros: ok, analytic els; one image takes < 1 ms a step here, < 1 ms for a sample" in (
        line.partition("; windows")[0].removesuffix(" of 20 steps") for line in lines
    )


@pytest.mark.slow
def test_check_of_the_bundled_models_finds_no_fault() -> None:
    result = run("check")
    assert (result.exit_code, result.stderr) == (0, "")
    assert len(result.stdout.splitlines()) == 1 + 5 + 4  # machines, networks


def test_check_names_each_model_that_is_refused_and_why(tmp_path: Path) -> None:
    bad = {"bad": "kind: magic\n", "worse": "kind: [", "zeros": DOCUMENTS["zeros"]}
    root = write_models(tmp_path / "models", bad)
    result = run("check", "--models", root)
    assert result.exit_code == 2
    assert "zeros: ok" in result.stdout
    for name in ("bad", "worse"):
        (line,) = (line for line in result.stderr.splitlines() if line.startswith(f"{name}: "))
        assert str(root / name / "model.yaml") in line


def test_check_looks_at_every_version(tmp_path: Path) -> None:
    root = write_models(tmp_path / "models", {"old": "kind: magic\n"})
    (root / "old" / "model.yaml").unlink()
    for number in (2, 3):
        folder = root / "old" / str(number)
        folder.mkdir()
        (folder / "model.yaml").write_text(DOCUMENTS["zeros"].replace("../", "../../"))
    result = run("check", "--models", root)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()[1:]
    assert [line.partition(";")[0] for line in lines] == [
        "old version 2: ok, analytic els",
        "old version 3: ok, analytic els",
    ]
    (root / "old" / "3" / "model.yaml").write_text("kind: magic\n")
    result = run("check", "--models", root)
    assert result.exit_code == 2
    assert str(root / "old" / "3" / "model.yaml") in result.stderr


def test_check_of_a_folder_without_models_is_a_fault(tmp_path: Path) -> None:
    result = run("check", "--models", tmp_path)
    assert result.exit_code == 2
    assert f"{tmp_path}: expected a folder NAME/model.yaml, found none" in result.stderr


def test_check_of_a_folder_that_is_not_there_is_a_fault(tmp_path: Path) -> None:
    result = run("check", "--models", tmp_path / "none")
    assert result.exit_code == 2
    assert f"{tmp_path / 'none'}: expected a folder of models" in result.stderr


@pytest.mark.parametrize(
    ("command", "default"),
    [
        ("run", "[default: 127.0.0.1]"),
        ("train", "[default: the paper's]"),
        ("calibrate", "[default: from 3 to the side]"),
        ("compare", "[default: the bundled ones]"),
        ("bank build", "[default: name of SOURCE]"),
    ],
)
def test_help_shows_defaults_that_are_described_in_words(command: str, default: str) -> None:
    result = run(*command.split(), "--help")
    assert (result.exit_code, default in " ".join(result.stdout.split())) == (0, True)


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


@pytest.mark.parametrize(
    ("options", "variables", "fault"),
    [
        (("--host", "0.0.0.0"), {}, "host: expected loopback, or tls_certificate and tls_key"),
        (("--host", "192.0.2.1", "--insecure"), {}, "host: expected an address of this machine"),
        ((), {"ELS_METRICS_HOST": "192.0.2.1"}, "metrics_host: expected an address of this"),
        (("--port", 9090), {}, "metrics_port: expected another port than port, got 9090"),
        ((), {"ELS_HEALTH_PORT": "50051"}, "health_port: expected another port than port"),
        (("--tls-key", "/nowhere.pem"), {}, "tls_key: expected tls_certificate beside it"),
        (("--tokens", "/nowhere.yaml"), {}, "/nowhere.yaml: expected a readable file"),
        ((), {"ELS_TRACES": "http://collector:4317"}, "traces: expected the extra 'tracing'"),
    ],
)
def test_check_refuses_what_a_start_would_refuse(
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[object, ...],
    variables: dict[str, str],
    fault: str,
) -> None:
    # As if the extra were not installed.
    monkeypatch.setitem(sys.modules, "els_service.server.telemetry.tracing", None)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = run("check", "--config-only", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert fault in result.stderr


# What is refused is a GPU that is not there.
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to be had")
def test_check_refuses_a_gpu_that_is_not_there() -> None:
    result = run("check", "--config-only", "--device", "cuda")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "device: expected a CUDA device, found none" in result.stderr


@pytest.fixture
def somebody() -> Iterator[None]:
    """Be somebody whom the system refuses what is root's."""
    before = os.geteuid()
    os.seteuid(before or 65534)
    yield
    os.seteuid(before)


FIRST = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")


@pytest.mark.skipif(not FIRST.exists() or int(FIRST.read_text()) <= 9, reason="9 is everybody's")
@pytest.mark.usefixtures("somebody")
@pytest.mark.parametrize("name", ["port", "metrics_port", "health_port"])
def test_check_refuses_a_port_that_only_root_may_take(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(f"ELS_{name.upper()}", "9")
    result = run("check", "--config-only")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"{name}: expected a port that this user may bind, got 9: Permission" in result.stderr


def test_check_takes_ports_that_are_in_use_at_the_moment() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert run("check", "--config-only", "--port", taken.getsockname()[1]).exit_code == 0


# No process may write a byte into a file: as on a read-only root, without being root.
_READ_ONLY = """
import resource, tempfile
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
tempfile.tempdir = None
import shlex, sys
from typer.testing import CliRunner
from els_service.cli.main import app
for command in sys.argv[1:]:
    result = CliRunner().invoke(app, shlex.split(command))
    print(result.exit_code, result.stdout, result.stderr, sep="|", end="")
"""


@pytest.mark.slow
def test_without_a_temporary_folder_every_command_that_needs_one_says_so_once(
    tmp_path: Path,
) -> None:
    commands = ["run", "check", "check --config-only", "train --data a --out b", "token x"]
    (script := tmp_path / "read_only.py").write_text(_READ_ONLY)
    shown = run_script(script, *commands)
    assert (shown.returncode, shown.stderr) == (0, "")
    *refused, token = shown.stdout.splitlines()[: len(commands)]
    for command, line in zip(commands, refused, strict=False):
        program = "els-server train" if command.startswith("train") else "els-server"
        start = f"2||{program}: TMPDIR: expected a temporary folder that can be written, got none:"
        assert line.startswith(start), line
        assert line.endswith("; mount one at /tmp, or name one here"), line
    assert token.startswith("0|"), token
