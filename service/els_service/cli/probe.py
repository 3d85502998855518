"""``els-server probe``: health check of the server in the same container, for HEALTHCHECK.

It runs every few seconds, so it imports neither torch nor models.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from els_service.config import load_settings
from els_service.errors import LoadError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

_UNHEALTHY = 1
_FAULT = 2
_SERVING = "SERVING"


@app.command("probe")
def probe(
    service: Annotated[
        str, typer.Option(help="Name of a model or service; empty for the server.")
    ] = "",
    timeout: Annotated[float, typer.Option(min=0.01, max=3600, help="Seconds to wait.")] = 3.0,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of the server's settings. [env: ELS_CONFIG]")
    ] = None,
) -> None:
    """Check the health of the local server; exits with 0 if it is SERVING, else 1 and a reason.

    The address is taken from the ELS_… variables and the YAML file; flags of `run` do not apply.
    """
    try:
        # The bounds of the option accept nan: comparisons with it are false.
        if math.isnan(timeout):
            raise LoadError("timeout", "expected seconds, got nan")
        settings = load_settings(config)
        if settings.port == 0 and not settings.health_port:
            raise LoadError("port", "expected the port of the server, got 0 (any)")
        from els_service.server.probe import check

        status = check(settings, service, timeout)
    except LoadError as error:
        print(f"els-server: {error}", file=sys.stderr)
        raise typer.Exit(_FAULT) from error
    print(status)
    raise typer.Exit(0 if status == _SERVING else _UNHEALTHY)
