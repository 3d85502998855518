"""``els explain`` against a real server."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.support.models_folder import DOCUMENTS, SHAPE, tiny_bank, write_models
from tests.support.processes import ServerProcess, serving
from typer.testing import CliRunner, Result

from els_client import Client
from els_client import _explain_pictures as drawing
from els_client.cli import app
from els_service.denoisers.banks import save_bank

FILES = ("mosaic.png", "displacement.png", "entropy.png", "sheet.png")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # As wide as tables need.
    monkeypatch.setenv("COLUMNS", "120")
    Image.fromarray(tiny_bank().images[3, 0]).save("in.png")


def els(server: ServerProcess, *args: str) -> Result:
    command = ["--target", server.target, "explain", *args]
    return CliRunner().invoke(app, command, catch_exceptions=False)


def test_a_picture_is_explained_by_a_table_and_four_pictures(
    server: ServerProcess, client: Client
) -> None:
    shown = els(server, "in.png", "--sigma", "1", "--model", "zeros", "--out", "why")
    assert shown.exit_code == 0
    assert all(Path("why", name).is_file() for name in FILES)
    x = tiny_bank().images[3:4]
    found = client.explain(x, model="zeros", sigma=1.0, images=8)
    with Image.open("why/mosaic.png") as picture:
        factor = picture.width // SHAPE[2]
        small = np.asarray(picture)[factor // 2 :: factor, factor // 2 :: factor]
    assert np.array_equal(small, drawing.mosaic(found))
    best = next(iter(found.images[0]))
    (row,) = (
        line.split() for line in shown.stdout.splitlines() if line.split()[1:2] == [str(best)]
    )
    assert row[2] == found.label_names[found.labels[best]]
    assert row[3] == f"{100 * found.shares[0, best]:.1f}"
    assert "effective sources" in shown.stdout
    assert "wrote why/mosaic.png" in shown.stdout


def test_json_has_all_that_the_table_has(server: ServerProcess, client: Client) -> None:
    args = ("in.png", "--sigma", "1", "--model", "local", "--label", "2", "--out", "why")
    answer = json.loads(els(server, *args, "--json").stdout)
    found = client.explain(tiny_bank().images[3:4], model="local", sigma=1.0, label=2, images=8)
    assert answer["files"] == [f"why/{name}" for name in FILES]
    assert answer["bank_fingerprint"] == tiny_bank().fingerprint
    assert answer["entropy"] == pytest.approx(float(found.entropy.mean()))
    listed = answer["bank_images"]
    assert [one["image"] for one in listed] == list(found.images[0])
    assert {one["label"] for one in listed} == {"gap"}
    assert sum(one["share"] for one in listed) == pytest.approx(1)
    assert sum(one["pixels"] for one in listed) == SHAPE[1] * SHAPE[2]


def test_a_sample_is_explained_at_its_last_step_or_another(
    server: ServerProcess, client: Client
) -> None:
    args = ("--seed", "3", "--steps", "4", "--model", "circular", "--out", "why", "--json")
    last = json.loads(els(server, *args).stdout)
    second = json.loads(els(server, *args, "--step", "2").stdout)
    released = json.loads(els(server, *args, "--sampler", "ddim_released").stdout)
    assert len(released["bank_images"]) == 8
    *_, final = client.sample(model="circular", seed=3, steps=4, explain_steps=[2, 4])
    assert last["entropy"] == pytest.approx(float(final.explanation.entropy.mean()))
    assert second["entropy"] > last["entropy"]
    other = json.loads(els(server, *args, "--first-image", "1").stdout)
    assert other["entropy"] != last["entropy"]


def test_files_are_named_where_the_bank_knows_them(tmp_path: Path) -> None:
    root = write_models(tmp_path / "models", {"zeros": DOCUMENTS["zeros"]})
    save_bank(tiny_bank(named=True), root / "_banks" / "tiny.safetensors")
    with serving("--models", root, "--threads", 1) as server:
        shown = els(server, "in.png", "--sigma", "0.2", "--model", "zeros", "--out", "why")
    assert shown.exit_code == 0
    assert "9.png" in shown.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "IN.png: expected a picture or --seed, got neither"),
        (("in.png", "--sigma", "1", "--seed", "1"), "--seed: expected none with IN.png, got 1"),
        (("in.png", "--sigma", "1", "--step", "1"), "--step: expected none with IN.png, got 1"),
        (("--seed", "1", "--alpha-bar", "0.5"), "--alpha-bar: expected none with --seed, got 0.5"),
        (("--seed", "1", "--step", "21"), "explain_steps: expected at most 20"),
        (("in.png",), "level: expected exactly one of sigma"),
    ],
)
def test_options_that_do_not_go_together_are_named(
    server: ServerProcess, args: tuple[str, ...], message: str
) -> None:
    shown = els(server, *args, "--model", "zeros", "--out", "why")
    assert shown.exit_code == 2
    assert message in shown.stderr


def test_a_model_without_sources_lists_those_that_have(server: ServerProcess) -> None:
    shown = els(server, "in.png", "--sigma", "1", "--model", "wiener", "--out", "why")
    assert shown.exit_code == 1
    assert "circular, equivariant, ideal, local, valid, zeros" in shown.stderr
    assert not list(Path("why").iterdir())
