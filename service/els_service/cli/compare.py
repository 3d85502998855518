"""``els-server compare``: runs ``els_service.experiments.compare``."""

from __future__ import annotations

import typer

app = typer.Typer()


@app.command(
    "compare",
    # Same parser as the module's command line, which runs without typer.
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def compare(context: typer.Context) -> None:
    """Compare a network with machines; writes compare.json and a figure."""
    from els_service.experiments.compare import main

    raise typer.Exit(main(context.args, program="els-server compare"))
