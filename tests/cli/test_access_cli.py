"""AccessControl that are refused before anything is served, and the command that makes tokens."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from tests.support.security import Certificates, TokenFile, bearing
from typer.testing import CliRunner, Result

from els_service.cli.main import app
from els_service.server.security.tokens import Tokens


@pytest.fixture(autouse=True)
def _no_settings_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("ELS_")]:
        monkeypatch.delenv(name)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def check(*options: object) -> Result:
    return run("check", "--config-only", *options)


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    made = Certificates(tmp_path)
    made.issue()
    return made


@pytest.fixture
def tokens(tmp_path: Path) -> TokenFile:
    file = TokenFile(tmp_path / "tokens")
    file.add("someone")
    return file


FOREIGN = ["10.1.2.3", "fd00::1"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "0", *FOREIGN])
@pytest.mark.parametrize("with_tokens", [False, True])
def test_an_address_beyond_loopback_needs_tls_or_insecure(
    host: str, with_tokens: bool, tokens: TokenFile, certificates: Certificates
) -> None:
    options = ["--tokens", tokens.path] if with_tokens else []
    result = check("--host", host, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    told = f"host: expected loopback, or tls_certificate and tls_key, got {host} with "
    assert told in result.stderr
    assert ("in plain text" in result.stderr) is with_tokens
    assert "pass --insecure if" in result.stderr
    assert result.stderr.count("\n") == 1
    for guard in (["--insecure"], certificates.options):
        guarded = check("--host", host, *options, *guard)
        assert guarded.exit_code == (2 if host in FOREIGN else 0)
        assert ("host: expected an address of this machine" in guarded.stderr) is (host in FOREIGN)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost", "::ffff:127.0.0.1"])
def test_loopback_needs_nothing(host: str, tokens: TokenFile) -> None:
    assert check("--host", host).exit_code == 0
    assert check("--host", host, "--tokens", tokens.path).exit_code == 0


def test_a_host_that_is_nowhere_is_named() -> None:
    result = check("--host", "256.0.0.1")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "host: expected an address, or a resolvable name, got 256.0.0.1" in result.stderr


def test_files_of_tls_that_do_not_fit_are_refused(
    certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strange, empty, none = tmp_path / "strange.key", tmp_path / "empty", tmp_path / "none"
    other = certificates.authority.issue_cert("example.org")
    strange.write_bytes(other.private_key_pem.bytes())
    empty.touch()
    pair = {"tls_certificate": certificates.certificate, "tls_key": certificates.key}
    for given, told in (
        ({"tls_key": certificates.key}, "tls_key: expected tls_certificate beside it"),
        ({"tls_certificate": certificates.certificate}, "tls_certificate: expected tls_key"),
        ({"tls_client_ca": certificates.client_ca}, "tls_client_ca: expected tls_certificate"),
        ({**pair, "tls_key": strange}, f"{certificates.certificate}, {strange}: expected"),
        ({**pair, "tls_key": none}, "No such file"),
        ({**pair, "tls_client_ca": empty}, f"{empty}: expected"),
    ):
        with monkeypatch.context() as variables:
            for name, path in given.items():
                variables.setenv(f"ELS_{name.upper()}", str(path))
            result = check()
        assert (result.exit_code, result.stdout) == (2, "")
        assert told in result.stderr


def test_a_file_of_tokens_that_is_wrong_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("[]")
    result = check("--tokens", tmp_path / "tokens")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"{tmp_path / 'tokens'}: document: " in result.stderr


def test_a_fresh_token_s_entry_can_be_appended_and_lets_it_in(tmp_path: Path) -> None:
    path, shown = tmp_path / "tokens.yaml", []
    for options in (("ci",), ("boss", "--role", "admin", "--expires", "2999-01-01")):
        result = run("token", *options)
        assert result.exit_code == 0
        shown.append(result.stderr.strip())
        assert shown[-1] not in result.stdout
        with path.open("a") as file:
            file.write(result.stdout)
    tokens = Tokens(path)
    assert tokens.caller(bearing(shown[0]), admin=False) == "ci"
    assert tokens.caller(bearing(shown[1]), admin=True) == "boss"
    assert json.dumps(yaml.safe_load(path.read_text()), default=str).count("sha256") == 2


@pytest.mark.parametrize("options", [("a b",), ("ci", "--role", "root"), ("ci", "--expires", "x")])
def test_a_token_that_the_file_could_not_hold_is_not_made(options: tuple[str, ...]) -> None:
    result = run("token", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "els_" not in result.stderr
