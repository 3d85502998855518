"""Tokens by their hashes: who is let in, and that no token is ever shown."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from tests.support.security import TokenFile, bearing

from els_service.errors import LoadError, PermissionDeniedError, UnauthenticatedError
from els_service.server.security.tokens import Tokens, new_token

HASH = "0123456789abcdef" * 4


@pytest.fixture
def file(tmp_path: Path) -> TokenFile:
    return TokenFile(tmp_path / "tokens")


def test_the_caller_is_the_name_of_its_token_and_admin_includes_infer(file: TokenFile) -> None:
    reader, boss = file.add("reader"), file.add("boss", "admin")
    tokens = Tokens(file.path)
    assert tokens.caller(bearing(reader), admin=False) == "reader"
    assert tokens.caller(bearing(boss), admin=False) == "boss"
    assert tokens.caller(bearing(boss), admin=True) == "boss"
    with pytest.raises(PermissionDeniedError, match="expected the role admin"):
        tokens.caller(bearing(reader), admin=True)


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", ""),),
        (("authorization", "Bearer"),),
        (("authorization", "Bearer \udcff"),),
        (("authorization", "Basic dTpw"),),
        (("authorization", b"Bearer x"),),
        (("authorization", "Bearer x"),),
        (("x-authorization", "Bearer x"),),
    ],
)
def test_a_call_without_a_known_token_is_rejected(
    file: TokenFile, metadata: tuple[tuple[str, str | bytes], ...]
) -> None:
    file.add("someone")
    with pytest.raises(UnauthenticatedError, match=r"^authorization: expected "):
        Tokens(file.path).caller(metadata, admin=False)


def test_the_hash_itself_is_no_token(file: TokenFile) -> None:
    file.add("someone")
    tokens = Tokens(file.path)
    with pytest.raises(UnauthenticatedError):
        tokens.caller(bearing(file.entries[0]["sha256"]), admin=False)


def test_a_token_expires_at_the_time_of_its_entry(file: TokenFile) -> None:
    now = datetime.now(UTC)
    old = file.add("old", expires=now - timedelta(seconds=1))
    new = file.add("new", expires=now + timedelta(hours=1))
    tokens = Tokens(file.path)
    assert tokens.caller(bearing(new), admin=False) == "new"
    with pytest.raises(UnauthenticatedError, match="expired"):
        tokens.caller(bearing(old), admin=False)


def test_two_tokens_of_one_name_are_one_caller(file: TokenFile) -> None:
    both = [file.add("ci"), file.add("ci")]
    tokens = Tokens(file.path)
    assert {tokens.caller(bearing(token), admin=False) for token in both} == {"ci"}


def test_yaml_and_json_have_the_same_content(tmp_path: Path) -> None:
    token, entry = new_token("ci", "admin", datetime.now(UTC) + timedelta(hours=1))
    path = tmp_path / "tokens.yaml"
    path.write_text(yaml.safe_dump([entry.model_dump(exclude_none=True)]))
    assert Tokens(path).caller(bearing(token), admin=True) == "ci"


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "document: "),
        ([], "document: "),
        ({"name": "a"}, "document: "),
        ([{"name": "a", "role": "infer"}], "0.sha256: field required"),
        ([{"name": "a", "role": "infer", "sha256": "els_secret"}], "0.sha256: "),
        ([{"name": "a", "role": "els_secret", "sha256": HASH}], "0.role: "),
        ([{"name": "a:els_secret", "role": "infer", "sha256": HASH}], "0.name: "),
        ([{"name": "a", "role": "infer", "token": "els_secret", "sha256": HASH}], "0.token: "),
        (
            [{"name": "a", "role": "infer", "sha256": HASH, "expires": "2030-01-01T00:00:00"}],
            "0.expires: ",
        ),
        ([{"name": name, "role": "infer", "sha256": HASH} for name in "ab"], "each sha256 once"),
    ],
)
def test_a_file_that_is_wrong_is_named_and_nothing_of_it_is_shown(
    tmp_path: Path, content: object, fault: str
) -> None:
    path = tmp_path / "tokens"
    path.write_text(json.dumps(content))
    with pytest.raises(LoadError) as caught:
        Tokens(path)
    assert str(path) in str(caught.value)
    assert fault in str(caught.value)
    assert "els_secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_syntax_error_names_its_line_and_quotes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text("- name: a\n  token: [els_secret\n- }")
    with pytest.raises(LoadError, match=r"expected YAML, got malformed content in line 3$"):
        Tokens(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="none: expected a readable file"):
        Tokens(tmp_path / "none")


def test_fresh_tokens_are_long_and_never_the_same() -> None:
    tokens = {new_token("a", "infer")[0] for _ in range(100)}
    assert len(tokens) == 100
    assert {len(token) for token in tokens} == {len("els_") + 43}
