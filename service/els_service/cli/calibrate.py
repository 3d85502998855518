"""``els-server calibrate``: runs ``els_service.experiments.calibrate``."""

from __future__ import annotations

import typer

app = typer.Typer()


@app.command(
    "calibrate",
    # Same parser as the module's command line, which runs without typer.
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def calibrate(context: typer.Context) -> None:
    """Fit a machine's windows to a network, or with --held-out MODEL to its bank alone."""
    if "--held-out" in context.args:
        from els_service.cli.held_out import app as held_out

        others = [argument for argument in context.args if argument != "--held-out"]
        raise typer.Exit(held_out(others, prog_name="els-server calibrate --held-out"))
    from els_service.experiments.calibrate import main

    raise typer.Exit(main(context.args, program="els-server calibrate"))
