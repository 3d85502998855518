"""Prints the oldest or newest requirements that ``pyproject.toml`` allows the client.

    python -m tests.support.client_requirements oldest|newest|EXTRA … > requirements.txt

Those of extras are the newest, and what the extras add.

``make client-environments`` installs both, and ``tests/e2e/test_client_versions.py`` runs the
client in them. Needs the standard library alone, so that they are installed beside ``.venv``.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def client_requirements(which: str) -> list[str]:
    """Return the client's requirements, pinned to their lower bounds if ``oldest``."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    if which == "oldest":
        return [_oldest(one) for one in project["dependencies"]]
    extra = [] if which == "newest" else _of_extra(which, project["optional-dependencies"])
    return [*project["dependencies"], *extra]


def _of_extra(name: str, extras: dict[str, list[str]]) -> list[str]:
    """Return the requirements of an extra, and of those that it names."""
    found: list[str] = []
    for requirement in extras[name]:
        own = requirement.removeprefix("els-denoise[")
        found += [requirement] if own == requirement else _of_extra(own.rstrip("]"), extras)
    return found


def _oldest(requirement: str) -> str:
    name, _, versions = requirement.partition(">=")
    return f"{name}=={versions.partition(',')[0]}"


if __name__ == "__main__":
    for which in sys.argv[1:]:
        print("\n".join(client_requirements(which)))
