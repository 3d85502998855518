"""The command line of the server: ``els-server``."""

from __future__ import annotations

from els_service.cli.main import app


def main() -> None:
    """Run ``els-server``."""
    app()
