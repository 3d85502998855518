"""``els-server calibrate --held-out``: what it writes, prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.comparing import squares, write_bank
from typer.testing import CliRunner, Result

from els_service.cli.main import app
from els_service.denoisers.windows import WindowTable
from els_service.errors import LoadError
from els_service.experiments import held_out
from els_service.experiments.model_text import set_key
from els_service.repository import ModelRepository, bundled_models
from els_service.yaml_files import read_yaml

MODEL = """\
# Squares.
kind: analytic   # a machine
machine: els
window: auto     # until chosen
bank: ../_banks/squares.safetensors
# The end.
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_bank(tmp_path / "_banks" / "squares.safetensors", squares(images=8))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.yaml").write_text(MODEL)
    return tmp_path / "mine"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["calibrate", *map(str, arguments), "--held-out"])


def test_the_chosen_windows_are_served_and_the_rest_of_the_file_is_kept(folder: Path) -> None:
    result = run(folder, "--queries", 16, "--windows", "1,3,5")
    assert result.exit_code == 0, result.output
    text = (folder / "model.yaml").read_text()
    before, after = MODEL.split("auto")
    assert text.startswith(before)
    assert text.endswith(after)
    table = ModelRepository(folder.parent).load("mine").info.window
    assert table is not None
    assert len(table.k) == 11
    assert set(table.k) <= {1, 3, 5, 7, 9, 11, 13, 15}
    assert "gain" in result.stdout
    assert f"written: window in {folder / 'model.yaml'}" in result.stdout
    # The same seed gives the same table.
    assert run(folder, "--queries", 16, "--windows", "1,3,5").exit_code == 0
    assert (folder / "model.yaml").read_text() == text


def test_json_has_the_error_of_each_level_and_window_and_dry_run_writes_nothing(
    folder: Path,
) -> None:
    result = run(folder, "--queries", 16, "--windows", "1,5", "--by-label", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["format"], found["queries"]) == ("els-held-out-1", 16)
    for level in found["levels"]:
        errors = {int(k): of["error"] for k, of in level["windows"].items()}
        published = level["fashion_mnist_resnet"]
        assert set(errors) == {1, 5, published["k"]}
        assert errors[level["k"]] == min(errors.values())
        excess = errors[published["k"]] - errors[level["k"]]
        assert published["excess"] == pytest.approx(excess, abs=1e-12)
    assert (folder / "model.yaml").read_text() == MODEL


def test_a_part_of_a_large_bank_may_choose(folder: Path) -> None:
    write_bank(folder.parent / "_banks" / "squares.safetensors", squares(images=200))
    few, all_ = (
        run(folder, *extra, "--queries", 8, "--windows", "3,5", "--dry-run", "--json").stdout
        for extra in (("--images", 64), ())
    )
    assert json.loads(few)["queries"] == json.loads(all_)["queries"] == 8
    assert few != all_


@pytest.mark.slow
def test_of_a_bank_that_would_take_long_a_part_is_used_and_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bank(folder.parent / "_banks" / "squares.safetensors", squares(images=200))
    few = ("--queries", 8, "--windows", "3,5", "--dry-run", "--json")
    whole = run(folder, *few)
    assert "using" not in whole.stderr
    monkeypatch.setattr(held_out, "_BUDGET", 1e7)
    part = run(folder, *few)
    assert "using 68 of 200 images, evenly: --images 200 takes all of them, and 3" in part.stderr
    assert json.loads(part.stdout)["images"] == 68
    every = run(folder, *few, "--images", 200)
    assert "using" not in every.stderr
    assert every.stdout == whole.stdout
    assert json.loads(every.stdout)["images"] == 200


def test_a_local_machine_has_windows_too(folder: Path) -> None:
    (folder / "model.yaml").write_text(MODEL.replace("els\n", "local\n"))
    assert run(folder, "--queries", 16, "--windows", "1,3").exit_code == 0


@pytest.mark.parametrize(
    ("content", "extra", "message"),
    [
        ("kind: wiener\nbank: x\n", (), "kind: expected analytic"),
        (MODEL.replace("els\n", "ideal\n"), (), "machine: expected els or local"),
        (MODEL.replace("squares", "none"), (), "none.safetensors: No such file"),
        (MODEL.replace("auto", "automatic"), (), "window"),
        (MODEL, ("--windows", "2"), "windows: expected odd numbers from 1 to 15, got 2"),
        (MODEL, ("--windows", "a"), "windows: expected odd numbers"),
        (MODEL, ("--device", "abacus"), "device: expected cpu, or cuda"),
        ("- 1\n", (), "kind: expected analytic"),
    ],
)
def test_what_has_no_windows_is_refused_by_name(
    folder: Path, content: str, extra: tuple[str, ...], message: str
) -> None:
    (folder / "model.yaml").write_text(content)
    result = run(folder, *extra)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", "").split())
    assert (folder / "model.yaml").read_text() == content


def test_bundled_models_are_not_changed() -> None:
    result = run(bundled_models() / "fashion-els")
    assert (result.exit_code, "outside the package" in result.stderr) == (2, True)


def test_check_says_which_windows_are_the_published_ones(folder: Path) -> None:
    def check() -> str:
        return CliRunner().invoke(app, ["check", "--models", str(folder.parent)]).stdout

    assert "windows fashion-mnist-resnet, of a network on Fashion-MNIST" in check()
    set_key(folder / "model.yaml", "window", 3)
    assert "windows" not in check()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1", "a: 1\nk: [1, 2]\n"),
        ("a: 1\n", "a: 1\nk: [1, 2]\n"),
        ("a: 1 # one\n# end\n", "a: 1 # one\nk: [1, 2]\n# end\n"),
        ("k: 1\r\na: 1\r\n", "k: [1, 2]\r\na: 1\r\n"),
        ("k:\n  x: [1]\n  y:\n  - 2\n# of a\na: 1\n", "k: [1, 2]\n# of a\na: 1\n"),
        ("k: {x: 1} # c\n", "k: [1, 2] # c\n"),
        ("{a: 1, b: 2}\n", "{a: 1, b: 2, k: [1, 2]}\n"),
        ("{a: 1, k: 7}\n", "{a: 1, k: [1, 2]}\n"),
        ("k: # later\n  5\na: é\n", "k: [1, 2]\na: é\n"),
        ("a: |\n  text\n", "a: |\n  text\nk: [1, 2]\n"),
        ("k: |\n  text\na: 1\n", "k: [1, 2]\na: 1\n"),
    ],
)
def test_a_key_is_set_in_place_and_all_else_is_kept(
    tmp_path: Path, text: str, expected: str
) -> None:
    path = tmp_path / "model.yaml"
    path.write_bytes(text.encode())
    set_key(path, "k", [1, 2])
    assert path.read_bytes().decode() == expected
    assert read_yaml(path)["k"] == [1, 2]


def test_a_file_that_cannot_be_edited_in_place_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    for text in ("a: &x 1\nk: &y [1]\nb: *y\n", "- 1\n"):
        path.write_text(text)
        with pytest.raises(LoadError, match="expected"):
            set_key(path, "k", 3)
        assert path.read_text() == text


def test_the_written_table_is_the_chosen_one(folder: Path) -> None:
    set_key(folder / "model.yaml", "window", {"sigma": [0.5, 80.2], "k": [3, 5]})
    served = ModelRepository(folder.parent).load("mine").info.window
    assert served == WindowTable((0.5, 80.2), (3, 5))
