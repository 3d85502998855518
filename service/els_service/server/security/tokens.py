"""Bearer tokens: a file of their hashes, checked at each call.

The file is YAML or JSON, a list of entries as printed by ``els-server token``:

    - {name: ci, role: infer, sha256: "9f86…", expires: 2027-01-01T00:00:00Z}

Roles: infer, and admin, which includes infer. A name may occur twice, to rotate its token.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter

from els_service.errors import LoadError, PermissionDeniedError, UnauthenticatedError
from els_service.server.security.reloaded_file import ReloadedFile, warn_if_public
from els_service.yaml_files import read_yaml, validate

Role = Literal["infer", "admin"]

_CHECK_EVERY_S = 1.0
_PREFIX = "els_"
"""Prefix by which secret scanners recognise tokens."""


class Entry(BaseModel):
    """Entry of one token; ``expires`` has a time zone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    role: Role
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    expires: AwareDatetime | None = None


_ENTRIES = TypeAdapter(Annotated[list[Entry], Field(min_length=1)])


@dataclass(frozen=True, slots=True)
class _Token:
    """Parsed entry; ``expires`` in seconds since the epoch."""

    name: str
    admin: bool
    digest: bytes
    expires: float


class Tokens:
    """Tokens of a file, which a thread checks for changes, at most once a second.

    Raises:
        LoadError: The file is unreadable, invalid or without entries.
    """

    def __init__(self, path: Path) -> None:
        self._tokens = ReloadedFile(
            (path,), lambda: _read(path), every_s=_CHECK_EVERY_S, background=True
        )

    def stale_s(self) -> float:
        """Return the seconds for which the file has been invalid; 0.0 while it is valid."""
        return self._tokens.stale_s()

    def caller(self, metadata: Iterable[tuple[str, str | bytes]], *, admin: bool) -> str:
        """Return the name of the token in a call's metadata.

        Args:
            metadata: names are lower case.
            admin: whether the method needs the role admin.

        Raises:
            UnauthenticatedError: There is no token, or it is unknown or expired.
            PermissionDeniedError: The token lacks the role.
        """
        digest = hashlib.sha256(_bearer(metadata)).digest()
        known = self._tokens.current().get(digest)
        # Clients cannot choose the hash, so the lookup leaks no timing; the comparison takes
        # constant time.
        if known is None or not hmac.compare_digest(known.digest, digest):
            raise UnauthenticatedError("authorization: expected a known token, got another")
        if known.expires <= time.time():
            raise UnauthenticatedError("authorization: expected a valid token, got an expired one")
        if admin and not known.admin:
            raise PermissionDeniedError("token: expected the role admin, got infer")
        return known.name


def new_token(name: str, role: Role, expires: AwareDatetime | None = None) -> tuple[str, Entry]:
    """Return a new token of 256 random bits, and its entry for the file.

    Raises:
        LoadError: The name or the date is invalid.
    """
    token = _PREFIX + secrets.token_urlsafe(32)
    sha256 = hashlib.sha256(token.encode()).hexdigest()
    fields = {"name": name, "role": role, "sha256": sha256, "expires": expires}
    return token, validate(TypeAdapter(Entry), fields, "token")


def _bearer(metadata: Iterable[tuple[str, str | bytes]]) -> bytes:
    for name, value in metadata:
        if name == "authorization" and isinstance(value, str):
            scheme, _, token = value.partition(" ")
            if scheme.lower() == "bearer":
                return token.strip().encode(errors="replace")
    raise UnauthenticatedError("authorization: expected Bearer TOKEN, got none")


def _read(path: Path) -> dict[bytes, _Token]:
    """Return the tokens by their hash.

    Raises:
        LoadError: Names the line but quotes nothing: the file may contain a token by mistake.
    """
    try:
        content = read_yaml(path)
    except LoadError as error:
        if isinstance(error.__cause__, OSError):
            raise
        mark = getattr(error.__cause__, "problem_mark", None)
        where = f" in line {mark.line + 1}" if isinstance(mark, yaml.Mark) else ""
        raise LoadError(path, f"expected YAML, got malformed content{where}") from None
    entries = validate(_ENTRIES, content, path, secret=True)
    warn_if_public(path)
    tokens = {token.digest: token for token in map(_token, entries)}
    if len(tokens) < len(entries):
        raise LoadError(path, "expected each sha256 once, got one twice")
    return tokens


def _token(entry: Entry) -> _Token:
    expires = entry.expires.timestamp() if entry.expires else math.inf
    return _Token(entry.name, entry.role == "admin", bytes.fromhex(entry.sha256), expires)
