"""Environments of packages that the client works beside, and development does without."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = os.pathsep.join(map(str, (ROOT / "proto" / "python", ROOT / "clients" / "python")))
"""``PYTHONPATH`` with the client."""


def python_with(module: str, name: str) -> Path:
    """Return a Python that has a module: this one, or that of ``make NAME``; else skip the test."""
    if find_spec(module):
        return Path(sys.executable)
    # Each is large, or patches what imports it: no part of the environment of development.
    return python_of(f".venv-{name}", f"make {name}")


def python_of(environment: str, command: str) -> Path:
    """Return the Python of an environment of the Makefile; else skip the test.

    An installation that was cut off leaves a Python, but not all of its packages.
    """
    folder = ROOT / environment
    if not (folder / ".installed").exists():
        # A development environment need not have it: the command that installs it is printed.
        pytest.skip(f"needs {environment}: {command}")
    return folder / "bin" / "python"
