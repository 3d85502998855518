"""Notebooks, run by ``make notebook`` with the Python of its environment."""

from __future__ import annotations

from pathlib import Path

PYTHON = Path(__file__).parents[2] / ".venv-notebook" / "bin" / "python"
# Collected once the environment exists: tests of development neither need nor skip them.
collect_ignore_glob = [] if PYTHON.exists() else ["test_*.py"]
