"""Commands of ``els-server`` in this process."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from els_service.cli.main import app

SEPARATE = """
import sys
for name in ("google", "grpc", "structlog", "prometheus_client"):
    sys.modules[name] = None
from els_service.cli import main
main()
"""
"""Program that runs a command without the packages of the server."""


def run(command: str, *arguments: object) -> Result:
    """Return the result of a command."""
    return CliRunner().invoke(app, [command, *map(str, arguments)])
