"""docs/explain.md: its commands and its example run, against a small bank."""

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
from els_service.denoisers.banks import save_bank

PAGE = (Path(__file__).parents[2] / "docs" / "explain.md").read_text()
COMMANDS = re.findall(r"^    els (explain .*)$", PAGE, re.MULTILINE)
(EXAMPLE,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the page's model, over a bank of three labels."""
    root = write_models(tmp_path_factory.mktemp("page") / "models", {})
    (root / "fashion-els").mkdir()
    (root / "fashion-els" / "model.yaml").write_text(DOCUMENTS["zeros"])
    save_bank(tiny_bank(named=True), root / "_banks" / "tiny.safetensors")
    with serving("--models", root, "--threads", 1) as server:
        yield server.target


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_writes_the_files_of_its_table(
    target: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(tiny_bank().images[0, 0]).save("in.png")
    # The small bank has fewer labels than the page's.
    words = shlex.split(command.replace("--label 7", "--label 2"))
    done = CliRunner().invoke(app, ["--target", target, *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    named = set(re.findall(r"^\| `(\w+\.png)` \|", PAGE, re.MULTILINE))
    assert {path.name for path in Path("why").iterdir()} == named


def test_the_example_of_the_page_runs(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    exec(EXAMPLE.replace("127.0.0.1:50051", target), names)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["2", "4"]
    assert names["file"] in [f"{i}.png" for i in range(12)]
    assert len(COMMANDS) == 3
