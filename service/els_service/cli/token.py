"""``els-server token``: a fresh token for its owner, and its entry for the file of tokens."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from typing import Annotated, Literal

import typer

from els_service.errors import LoadError

_FAULT = 2


def token(
    name: Annotated[str, typer.Argument(help="Who will use it; shown in logs.")],
    role: Annotated[
        Literal["infer", "admin"], typer.Option(help="admin may load models and change the log.")
    ] = "infer",
    expires: Annotated[
        datetime | None, typer.Option(help="When it ends, in UTC. [default: never]")
    ] = None,
) -> None:
    """Print a fresh token to stderr, once, and its entry to stdout.

    els-server token ci --role infer >> tokens.yaml
    """
    from els_service.server.security.tokens import new_token

    try:
        fresh, entry = new_token(name, role, expires.replace(tzinfo=UTC) if expires else None)
    except LoadError as error:
        print(f"els-server: {error}", file=sys.stderr)
        raise typer.Exit(_FAULT) from error
    # The token goes where it does not end up in the file.
    print(fresh, file=sys.stderr)
    # JSON is YAML too.
    print(f"- {json.dumps(entry.model_dump(mode='json', exclude_none=True))}")
