"""docs/originality.md: its commands and its example run, against a small bank."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from tests.support.models_folder import DOCUMENTS, tiny_bank, write_models
from tests.support.processes import serving
from typer.testing import CliRunner

from els_client.cli import app

PAGE = (Path(__file__).parents[2] / "docs" / "originality.md").read_text()
COMMANDS = re.findall(r"^    els (.*)$", PAGE, re.MULTILINE)
(EXAMPLE,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of models by the page's names, over a bank of three labels."""
    root = write_models(tmp_path_factory.mktemp("page") / "models", {})
    for name, document in (("fashion-els", "zeros"), ("fashion-unet", "wiener")):
        (root / name).mkdir()
        (root / name / "model.yaml").write_text(DOCUMENTS[document])
    with serving("--models", root, "--threads", 1) as server:
        yield server.target


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_runs(
    target: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(tiny_bank().images[0, 0]).save("in.png")
    # The small bank has fewer labels than the page's.
    words = shlex.split(command.replace("--label 7", "--label 2"))
    done = CliRunner().invoke(app, ["--target", target, *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert Path("sheet.png").is_file() == ("sheet.png" in words)


def test_the_example_of_the_page_runs(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(EXAMPLE.replace("127.0.0.1:50051", target).replace("label=7", "label=2"), {})
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.split()[0] in ("True", "False")
    assert "needs a bank of at least 51 images, this has 12" in second
    assert float(third) >= 0
    assert len(COMMANDS) == 4
