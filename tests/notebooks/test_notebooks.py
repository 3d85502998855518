"""The notebook runs against the bundled models, and what it says of them holds."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.notebooks.conftest import PYTHON
from tests.support.environments import ROOT, SOURCES
from tests.support.processes import environment, serving

from els_service.repository import bundled_models

NOTEBOOK = ROOT / "clients" / "examples" / "from_noise_to_claim.ipynb"
MODELS = ("_banks", "fashion-els", "fashion-ideal", "fashion-resnet")
OUT = os.environ.get("NOTEBOOK_OUT")
"""File for the executed notebook, to look at its pictures."""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """The outputs of each cell of code."""
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "models").mkdir()
    for name in MODELS:
        shutil.copytree(bundled_models() / name, folder / "models" / name)
    out = Path(OUT or folder / "executed.ipynb").absolute()
    with serving("--models", folder / "models") as server:
        done = subprocess.run(
            [PYTHON, Path(__file__).with_name("execute.py"), NOTEBOOK, out],
            env=environment(PYTHONPATH=SOURCES, ELS_TARGET=server.target),
            capture_output=True,
            text=True,
            timeout=290,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    cells = json.loads(out.read_text())["cells"]
    return [cell["outputs"] for cell in cells if cell["cell_type"] == "code"]


def text_of(outputs: list[dict[str, Any]]) -> str:
    return "".join("".join(one.get("text", "")) for one in outputs)


def test_every_part_shows_a_picture(outputs: list[list[dict[str, Any]]]) -> None:
    pictures = [sum("image/png" in one.get("data", {}) for one in cell) for cell in outputs]
    assert pictures == [0, 1, 1, 2, 1, 0]
    errors = [one for cell in outputs for one in cell if one.get("name") == "stderr"]
    assert not errors


def test_the_machine_predicts_the_network_and_the_ideal_machine_does_not(
    outputs: list[list[dict[str, Any]]],
) -> None:
    found = re.findall(r"^(fashion-\w+) +median r = (-?[\d.]+)", text_of(outputs[-1]), re.MULTILINE)
    medians = {name: float(value) for name, value in found}
    assert medians["fashion-els"] > 0.85
    assert medians["fashion-ideal"] < medians["fashion-els"] - 0.1


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
