"""Prints the oldest or newest requirements that ``pyproject.toml`` allows the client.

    python -m tests.support.client_requirements oldest > oldest.txt

``make client-environments`` installs both, and ``tests/e2e/test_client_versions.py`` runs the
client in them.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def client_requirements(which: str) -> list[str]:
    """Return the client's requirements, pinned to their lower bounds if ``oldest``."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(text) for text in project["dependencies"]]
    return [_oldest(one) if which == "oldest" else str(one) for one in wanted]


def _oldest(requirement: Requirement) -> str:
    (bound,) = (one.version for one in requirement.specifier if one.operator == ">=")
    return f"{requirement.name}=={bound}"


if __name__ == "__main__":
    print("\n".join(client_requirements(sys.argv[1])))
