"""``els-server token``: creates a bearer token and its entry for the tokens file."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from typing import Annotated, Literal

import typer

from els_service.errors import LoadError

_FAULT = 2


def token(
    name: Annotated[str, typer.Argument(help="Name of the caller; shown in logs.")],
    role: Annotated[
        Literal["infer", "admin"],
        typer.Option(help="admin may load models and set the log level."),
    ] = "infer",
    expires: Annotated[
        datetime | None, typer.Option(help="Expiry time, in UTC. [default: never]")
    ] = None,
) -> None:
    """Print a new token to stderr, and its entry for the tokens file to stdout.

    els-server token ci --role infer >> tokens.yaml
    """
    from els_service.server.security.tokens import new_token

    try:
        fresh, entry = new_token(name, role, expires.replace(tzinfo=UTC) if expires else None)
    except LoadError as error:
        print(f"els-server: {error}", file=sys.stderr)
        raise typer.Exit(_FAULT) from error
    # stderr, so that the token is not redirected to the file.
    print(fresh, file=sys.stderr)
    # JSON is valid YAML.
    print(f"- {json.dumps(entry.model_dump(mode='json', exclude_none=True))}")
