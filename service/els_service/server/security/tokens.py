"""Bearer tokens: a file of their hashes, looked up at every call.

The file is YAML or JSON, a list of entries as ``els-server token`` prints them:

    - {name: ci, role: infer, sha256: "9f86…", expires: 2027-01-01T00:00:00Z}

Roles: infer, and admin, which includes it. A name may stand there twice, to replace a token.
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

_LOOK_EVERY_S = 1.0
_PREFIX = "els_"
"""Lets scanners recognise a token in a place where it should not be."""


class Entry(BaseModel):
    """What the file says of one token; expires: with a time zone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    role: Role
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    expires: AwareDatetime | None = None


_ENTRIES = TypeAdapter(Annotated[list[Entry], Field(min_length=1)])


@dataclass(frozen=True, slots=True)
class _Known:
    name: str
    admin: bool
    digest: bytes
    expires: float


class Tokens:
    """The tokens of a file, which is looked at once a second at most, in a thread.

    Raises:
        LoadError: The file cannot be read or holds no entries.
    """

    def __init__(self, path: Path) -> None:
        self._known = ReloadedFile(
            (path,), lambda: _read(path), every_s=_LOOK_EVERY_S, background=True
        )

    def stale_s(self) -> float:
        """Return the seconds for which the file has been unusable; 0.0 while it is usable."""
        return self._known.stale_s()

    def caller(self, metadata: Iterable[tuple[str, str | bytes]], *, admin: bool) -> str:
        """Return the name of the token that a call's metadata show.

        Args:
            metadata: names are lower case.
            admin: whether the call needs that role.

        Raises:
            UnauthenticatedError: There is none, or it is unknown or expired.
            PermissionDeniedError: It has not the role.
        """
        digest = hashlib.sha256(_bearer(metadata)).digest()
        known = self._known.current().get(digest)
        # Found by its hash, which no caller can steer; the comparison that decides takes as long
        # for any.
        if known is None or not hmac.compare_digest(known.digest, digest):
            raise UnauthenticatedError("authorization: expected a known token, got another")
        if known.expires <= time.time():
            raise UnauthenticatedError("authorization: expected a valid token, got an expired one")
        if admin and not known.admin:
            raise PermissionDeniedError("token: expected the role admin, got infer")
        return known.name


def new_token(name: str, role: Role, expires: AwareDatetime | None = None) -> tuple[str, Entry]:
    """Return a fresh token of 256 random bits, and the entry for the file.

    Raises:
        LoadError: The name or the date is none that the file may hold.
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


def _read(path: Path) -> dict[bytes, _Known]:
    """Return the tokens by their hash.

    Raises:
        LoadError: Says where, but shows nothing of the file: it may hold a token by mistake.
    """
    try:
        content = read_yaml(path)
    except LoadError as error:
        if isinstance(error.__cause__, OSError):
            raise
        mark = getattr(error.__cause__, "problem_mark", None)
        where = f" in line {mark.line + 1}" if isinstance(mark, yaml.Mark) else ""
        raise LoadError(path, f"expected YAML, got a fault{where}") from None
    entries = validate(_ENTRIES, content, path, secret=True)
    warn_if_public(path)
    known = {one.digest: one for one in map(_known, entries)}
    if len(known) < len(entries):
        raise LoadError(path, "expected each sha256 once, got one twice")
    return known


def _known(entry: Entry) -> _Known:
    expires = entry.expires.timestamp() if entry.expires else math.inf
    return _Known(entry.name, entry.role == "admin", bytes.fromhex(entry.sha256), expires)
