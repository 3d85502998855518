"""``els-server train``: runs ``els_service.experiments.train``."""

from __future__ import annotations

import typer

app = typer.Typer()


@app.command(
    "train",
    # Same parser as the module's command line, which runs without typer.
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def train(context: typer.Context) -> None:
    """Train a network on a data set; writes a model folder."""
    from els_service.experiments.train import main

    raise typer.Exit(main(context.args, program="els-server train"))
