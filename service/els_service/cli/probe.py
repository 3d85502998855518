"""``els-server probe``: how the server beside it is, for a container's HEALTHCHECK.

It runs every few seconds beside a server at work, so it loads neither torch nor models.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from els_service.config import load_settings
from els_service.errors import LoadError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_UNHEALTHY = 1
_FAULT = 2
_SERVING = "SERVING"


@app.command("probe")
def probe(
    service: Annotated[
        str, typer.Option(help="What to ask for: a model, a service; empty for the whole server.")
    ] = "",
    timeout: Annotated[float, typer.Option(min=0.01, max=3600, help="Seconds to wait.")] = 3.0,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of the server's settings. [env: ELS_CONFIG]")
    ] = None,
) -> None:
    """Ask the server here whether it serves; exits with 0 if so, else with 1 and the reason.

    It finds the server by the same ELS_… variables and the same file; flags of run it cannot know.
    """
    try:
        # Of nan no comparison is true, so the option's own bounds let it pass.
        if math.isnan(timeout):
            raise LoadError("timeout", "expected seconds, got nan")
        settings = load_settings(config)
        if settings.port == 0 and not settings.health_port:
            raise LoadError("port", "expected the port that the server listens at, got 0 (any)")
        from els_service.server.probe import ask

        answer = ask(settings, service, timeout)
    except LoadError as error:
        print(f"els-server: {error}", file=sys.stderr)
        raise typer.Exit(_FAULT) from error
    print(answer)
    raise typer.Exit(0 if answer == _SERVING else _UNHEALTHY)
