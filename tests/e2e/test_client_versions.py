"""The client works beside the oldest and the newest packages that it may be installed with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support.client_requirements import ROOT, client_requirements
from tests.support.environments import python_of
from tests.support.processes import ServerProcess

SCRIPT = Path(__file__).with_name("client_script.py")
SOURCES = (ROOT / "proto" / "python", ROOT / "clients" / "python")


def report(python: Path | str, server: ServerProcess, folder: Path) -> Any:
    """Return what the script gets from the server in an environment, in which it may not warn."""
    folder.mkdir()
    done = subprocess.run(
        [str(python), str(SCRIPT), server.target, str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, SOURCES))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def expected(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return report(sys.executable, server, tmp_path_factory.mktemp("client") / "here")


def test_the_script_gets_what_it_asks_for(expected: Any) -> None:
    texts = [text for text in expected["commands"].values() if isinstance(text, str)]
    assert [text[0] for text in texts] == [
        *("0", "0", "0", "0"),
        "3",
    ]
    assert expected["library"]["refused"][0][0] == "level.sigma"


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="stubs from here need newer packages")
@pytest.mark.parametrize("which", ["oldest", "newest"])
def test_oldest_and_newest_packages_answer_alike(
    which: str, server: ServerProcess, expected: Any, tmp_path: Path
) -> None:
    python = python_of(f".venv-client-{which}", "make client-environments")
    assert report(python, server, tmp_path / which) == expected


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    pins = dict(text.split("==") for text in client_requirements("oldest"))
    assert (pins["protobuf"], pins["numpy"], pins["pillow"]) == ("5.26.1", "1.26", "10.1")
