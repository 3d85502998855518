"""The command line of the server: ``els-server``."""

from __future__ import annotations

import importlib
import os
import signal
import sys

_SEPARATE = ("probe", "train", "calibrate", "compare")
"""Commands that run without the imports of the others: ``probe`` because it runs every few seconds
and they take one, the experiments because they work without the packages of the server."""


def main() -> None:
    """Run ``els-server``."""
    if sys.argv[1:] == ["--version"]:
        # The same text as of cli.main, without imports of two seconds.
        from els_service.version import COMMIT, VERSION

        print(f"els-server {VERSION} ({COMMIT})")
        return
    if sys.argv[1:2] == ["run"]:
        # Handled until the server installs its own handlers: importing torch takes seconds, and
        # the default action exits with another code, or is ignored by PID 1 of a container.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    # Read when torch is imported: idle OpenMP threads sleep. By default they spin, which makes a
    # computation on a busy machine twenty times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        if (name := "".join(sys.argv[1:2])) in _SEPARATE:
            command = importlib.import_module(f"els_service.cli.{name}").app
            command(sys.argv[2:], prog_name=f"els-server {name}")
        from els_service.cli.main import app
    except ModuleNotFoundError as error:
        # The command is always installed, its dependencies only with the extra.
        sys.exit(f"els-server: {error}; install the extra: 'els-denoise[server]'")
    app()
