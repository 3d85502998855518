"""Commands for operators: ``els repository`` and ``els log-level``."""

from __future__ import annotations

from typing import Annotated

import typer

from els_client import _options as options
from els_client import _terminal as terminal
from els_client._options import TARGET, AsJson, Target, Timeout
from els_client._repository import LogLevel

repository = typer.Typer(no_args_is_help=True, help="List, load and unload the models of a server.")

Name = Annotated[str, typer.Argument(metavar="MODEL", help="Name of the model.")]


@repository.command()
def index(
    context: typer.Context,
    ready: Annotated[bool, typer.Option("--ready", help="Only served models.")] = False,
    target: Target = TARGET,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """List every model with version, state and statistics."""
    with options.connected(context, target, timeout, healthy_only=False) as client:
        models = client.repository.index(ready=ready)
        statistics = (
            client.repository.statistics() if any(m.state == "READY" for m in models) else []
        )
        terminal.list_repository(models, statistics, as_json)


@repository.command()
def load(
    context: typer.Context, name: Name, target: Target = TARGET, timeout: Timeout = None
) -> None:
    """Load or reload a model without interruption. Requires the role admin."""
    with (
        options.connected(context, target, timeout, healthy_only=False) as client,
        terminal.waiting(f"loading {name}"),
    ):
        client.repository.load(name)
    typer.echo(f"loaded {name}")


@repository.command()
def unload(
    context: typer.Context, name: Name, target: Target = TARGET, timeout: Timeout = None
) -> None:
    """Unload a model. Requires the role admin."""
    with options.connected(context, target, timeout, healthy_only=False) as client:
        client.repository.unload(name)
    typer.echo(f"unloaded {name}")


def log_level(
    context: typer.Context,
    level: Annotated[
        LogLevel | None, typer.Argument(help="New level; if omitted, the level is only printed.")
    ] = None,
    target: Target = TARGET,
    timeout: Timeout = None,
) -> None:
    """Print or set the server's log level. Requires the role admin."""
    with options.connected(context, target, timeout, healthy_only=False) as client:
        typer.echo(client.repository.log_level(level))
