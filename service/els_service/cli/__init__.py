"""The command line of the server: ``els-server``."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Run ``els-server``."""
    if sys.argv[1:2] == ["run"]:
        # Handled until the server installs its own handlers: importing torch takes seconds, and
        # the default action exits with another code, or is ignored by PID 1 of a container.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    # Read when torch is imported: idle OpenMP threads sleep. By default they spin, which makes a
    # computation on a busy machine twenty times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        if sys.argv[1:2] == ["probe"]:
            # Run every few seconds: importing the other commands would take a second each time.
            from els_service.cli.probe import app as probe

            probe(sys.argv[2:], prog_name="els-server probe")
        from els_service.cli.main import app
    except ModuleNotFoundError as error:
        # The command is always installed, its dependencies only with the extra.
        sys.exit(f"els-server: {error}; install the extra: 'els-denoise[server]'")
    app()
