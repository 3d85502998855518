"""The commands of an operator: ``els repository`` and ``els log-level``."""

from __future__ import annotations

from typing import Annotated

import typer

from els_client import _options as options
from els_client import _terminal as terminal
from els_client._options import TARGET, AsJson, Target, Timeout
from els_client._repository import LogLevel

repository = typer.Typer(
    no_args_is_help=True, help="See, load and unload the models of a server's repository."
)

Name = Annotated[str, typer.Argument(metavar="MODEL", help="Name of the model.")]


@repository.command()
def index(
    context: typer.Context,
    ready: Annotated[bool, typer.Option("--ready", help="Only what is served.")] = False,
    target: Target = TARGET,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """List every model with its version and state, and what was asked of it."""
    with options.connected(context, target, timeout, healthy_only=False) as client:
        models = client.repository.index(ready=ready)
        asked = client.repository.statistics() if any(m.state == "READY" for m in models) else []
        terminal.list_repository(models, asked, as_json)


@repository.command()
def load(
    context: typer.Context, name: Name, target: Target = TARGET, timeout: Timeout = None
) -> None:
    """Load a model, or load it anew; its callers notice nothing. Needs the role admin."""
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
    """Stop serving a model. Needs the role admin."""
    with options.connected(context, target, timeout, healthy_only=False) as client:
        client.repository.unload(name)
    typer.echo(f"unloaded {name}")


def log_level(
    context: typer.Context,
    level: Annotated[
        LogLevel | None, typer.Argument(help="What to log from now on; else only asks.")
    ] = None,
    target: Target = TARGET,
    timeout: Timeout = None,
) -> None:
    """Tell how much the server logs, and change it. Needs the role admin."""
    with options.connected(context, target, timeout, healthy_only=False) as client:
        typer.echo(client.repository.log_level(level))
