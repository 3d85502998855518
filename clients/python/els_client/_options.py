"""Connection options of the commands, and their client."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from els_client._client import Client
from els_client._types import Tls
from els_client.errors import (
    DeadlineExceededError,
    ElsError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)

_MOST_DIGITS = 9
"""Of a side in pixels: more do not fit a message."""
TARGET = "127.0.0.1:50051"
MODEL = "fashion-els"

Target = Annotated[str, typer.Option(help="Address of the server.", metavar="HOST:PORT")]
ModelName = Annotated[str, typer.Option(help="Name of the model.")]
Timeout = Annotated[
    float | None,
    typer.Option(help="Deadline in seconds; by default 60, and 600 to sample.", min=0.001),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]

EXIT_CODES_HELP = (
    "Exit codes: 0 success · 2 wrong usage or argument · 3 no such model · 4 server unavailable"
    " · 5 deadline exceeded · 6 full or over a limit · 7 not allowed · 1 any other failure."
)
_EXIT_CODES: dict[type[Exception], int] = {
    InvalidArgumentError: 2,
    NotFoundError: 3,
    UnavailableError: 4,
    DeadlineExceededError: 5,
    ResourceExhaustedError: 6,
    UnauthenticatedError: 7,
    PermissionDeniedError: 7,
}


@dataclass(frozen=True)
class Access:
    """Certificates and token of a connection."""

    tls: Tls | None = None
    token: str | None = field(default=None, repr=False)


def access(
    *,
    encrypted: bool,
    ca: Path | None,
    certificate: Path | None,
    key: Path | None,
    token_file: Path | None,
) -> Access:
    """Return the access options; any TLS file enables TLS."""
    tls = Tls(ca=ca, certificate=certificate, key=key)
    token = None if token_file is None else token_file.read_text(encoding="utf-8").strip()
    return Access(tls if encrypted or tls != Tls() else None, token)


@contextmanager
def connected(
    context: typer.Context, target: str, timeout_s: float | None, *, healthy_only: bool = True
) -> Iterator[Client]:
    """Yield a client; an error inside becomes one line on stderr and an exit code."""
    access: Access = context.obj
    how: dict[str, Any] = {"tls": access.tls, "token": access.token, "healthy_only": healthy_only}
    with failures(), Client(target, timeout_s=timeout_s, **how) as client:
        yield client


@contextmanager
def failures() -> Iterator[None]:
    """Convert an error inside to one line on stderr and an exit code."""
    try:
        yield
    except (ElsError, OSError) as error:
        typer.echo(f"els: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(_EXIT_CODES.get(type(error), 1)) from None


def sides(text: str, form: str) -> tuple[int, int]:
    """Return both numbers of ``64x96``; raises InvalidArgumentError with the ``form`` expected."""
    numbers = text.lower().split("x")
    if len(numbers) != 2 or not all(
        side.isascii() and side.isdigit() and len(side) <= _MOST_DIGITS for side in numbers
    ):
        raise InvalidArgumentError(f"size: expected {form} in pixels, got {text}")
    return int(numbers[0]), int(numbers[1])
