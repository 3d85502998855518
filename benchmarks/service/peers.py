"""Other model servers, pinned in separate virtual environments: installs and runs them.

    python -m benchmarks.service.peers install [NAME …] [--python /usr/bin/python3]

PyTriton needs the distribution's own Python 3.11 (``apt-get install python3 python3-venv``), and
``perf_analyzer`` the library ``libb64-0d`` of Debian.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.service.messages import MODEL
from benchmarks.service.servers import Running, free_port, running

VENVS = Path(__file__).parents[2] / ".venv-peers"
_PROGRAMS = Path(__file__).with_name("peer_servers")

REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "kserve": ("kserve==0.21.0",),
    # With a newer uvloop its workers do not start.
    "mlserver": ("mlserver==1.7.1", "uvloop==0.21.0"),
    "pytriton": ("nvidia-pytriton==0.7.0", "numpy==1.26.4"),
    # The last wheel that contains the program.
    "perf_analyzer": ("tritonclient==2.41.0", "nvidia-cuda-runtime-cu12==12.9.79"),
}
"""Peer → its requirements; the first is the peer itself."""


def installed(name: str) -> bool:
    """Return whether the virtual environment of a peer is complete."""
    return (VENVS / name / ".installed").exists()


def install(name: str, python: str) -> None:
    """Create the virtual environment of a peer, replacing an old one.

    Raises:
        subprocess.CalledProcessError: The environment cannot be created, or pip failed.
    """
    venv = VENVS / name
    shutil.rmtree(venv, ignore_errors=True)
    subprocess.run((python, "-m", "venv", venv), check=True)
    subprocess.run((venv / "bin" / "pip", "install", "--quiet", *REQUIREMENTS[name]), check=True)
    (venv / ".installed").touch()


@contextmanager
def peer(name: str) -> Iterator[Running]:
    """Run a peer with the affine model; it may not be ready yet.

    Args:
        name: kserve, mlserver or pytriton.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        command: tuple[str | Path, ...]
        if name == "mlserver":
            _mlserver_folder(Path(folder), port)
            command = (VENVS / name / "bin" / "mlserver", "start", folder)
        else:
            program = _PROGRAMS / f"{name}_server.py"
            command = (VENVS / name / "bin" / "python", program, str(port))
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        # PyTriton unpacks itself here, by default in the home folder, and does not clean up.
        environment["PYTRITON_HOME"] = folder
        with running(command, port, environment) as server:
            yield server


def _mlserver_folder(folder: Path, port: int) -> None:
    """Write the settings of ``mlserver start``: no worker processes, metrics or access log."""
    shutil.copy(_PROGRAMS / "mlserver_model.py", folder)
    settings = {
        "host": "127.0.0.1",
        "http_port": free_port(),
        "grpc_port": port,
        "metrics_endpoint": None,
        "parallel_workers": 0,
        "debug": False,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    model = {"name": MODEL, "implementation": "mlserver_model.Affine"}
    (folder / "model-settings.json").write_text(json.dumps(model))


def main(arguments: Sequence[str] | None = None) -> None:
    """Install the named peers, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["install"])
    parser.add_argument("names", nargs="*", choices=[[], *REQUIREMENTS], help="default: all")
    parser.add_argument("--python", default="/usr/bin/python3", help="Python of the environments")
    options = parser.parse_args(arguments)
    for name in options.names or REQUIREMENTS:
        install(name, options.python)
        print(f"{name}: {' '.join(REQUIREMENTS[name])}")


if __name__ == "__main__":
    main()
