"""The command line of the server: ``els-server``."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Run ``els-server``."""
    if sys.argv[1:2] == ["run"]:
        # Until the server listens for it: importing torch takes seconds, and by default a signal
        # ends a process with another code, or not at all where it is the first of a container.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    # Read when torch is imported: idle threads of a computation shall sleep. Spinning, as they
    # would, they keep each other from the cores of a busy machine: it takes twenty times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        if sys.argv[1:2] == ["probe"]:
            # Asked every few seconds: the other commands' parts would cost it a second each time.
            from els_service.cli.probe import app as probe

            probe(sys.argv[2:], prog_name="els-server probe")
        from els_service.cli.main import app
    except ModuleNotFoundError as error:
        # The command comes with every installation, what it needs only with the extra.
        sys.exit(f"els-server: {error}; it needs the server's parts: 'els-denoise[server]'")
    app()
