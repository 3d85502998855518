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
    python = ROOT / f".venv-{name}" / "bin" / "python"
    if not python.exists():
        # Each is large, or patches what imports it: no part of the environment of development.
        pytest.skip(f"needs {name}: make {name}")
    return python
