"""``els originality`` and ``els sweep`` against a real server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.support.models_folder import tiny_bank
from tests.support.processes import ServerProcess
from typer.testing import CliRunner, Result

from els_client import Client
from els_client.cli import app


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    Image.fromarray(tiny_bank().images[3, 0]).save("in.png")


def els(server: ServerProcess, *args: str) -> Result:
    return CliRunner().invoke(app, ["--target", server.target, *args], catch_exceptions=False)


def test_a_copy_of_a_bank_image_is_shown_as_memorised(server: ServerProcess) -> None:
    shown = els(server, "originality", "in.png", "--model", "zeros")
    assert shown.exit_code == 0
    assert "memorised and copied" in shown.stdout
    assert "needs a bank of at least 51 images, this has 12" in shown.stdout
    assert "nearest of 12 bank images: 3 at 0, " in shown.stdout


def test_json_of_a_sample_has_its_report(server: ServerProcess, client: Client) -> None:
    args = ("originality", "--seed", "5", "--steps", "3", "--model", "wiener", "--bank", "local")
    answer = json.loads(els(server, *args, "--json").stdout)
    *_, last = client.sample(model="wiener", seed=5, steps=3)
    (found,) = client.originality(last.x, model="local")
    assert answer["nearest"] == found.nearest.tolist()
    assert answer["seams"] == found.seams
    assert answer["gap_ratio"] == found.gap_ratio
    assert (answer["model"], answer["bank"]) == ("wiener", "local")
    assert answer["eidetic"] is None


def test_a_sweep_is_one_sheet_of_all_settings(server: ServerProcess, client: Client) -> None:
    args = ("sweep", "sheet.png", "--seed", "2", "--steps", "3", "--model", "zeros")
    answer = json.loads(els(server, *args, "--json").stdout)
    titles = [one["setting"] for one in answer["pictures"]]
    assert titles[0] == "ddim"
    assert len(titles) == 9
    *_, last = client.sample(
        model="zeros", seed=2, steps=3, sampler="heun", churn=2, originality=True
    )
    churned = answer["pictures"][titles.index("heun, churn 2")]
    assert churned["gap_ratio"] == last.originality[0].gap_ratio
    with Image.open("sheet.png") as sheet:
        assert len(np.unique(np.asarray(sheet))) > 10
        assert sheet.width > 600
    shown = els(server, *args)
    assert "ddim, windows x 1.5" in shown.stdout
    assert "wrote sheet.png" in shown.stdout


def test_a_model_without_windows_has_a_sheet_without_them(server: ServerProcess) -> None:
    args = ("sweep", "sheet.png", "--steps", "2", "--model", "ideal", "--json")
    titles = [one["setting"] for one in json.loads(els(server, *args).stdout)["pictures"]]
    assert len(titles) == 6
    assert not any("windows" in title for title in titles)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("originality",), 2, "IN.png: expected a picture or --seed, got neither"),
        (("originality", "in.png", "--seed", "1"), 2, "--seed: expected none with IN.png, got 1"),
        (("originality", "--seed", "1", "--sigma", "1"), 2, "--sigma: expected none with --seed"),
        (("originality", "in.png", "--model", "absent"), 3, "absent"),
        (("sweep", "sheet.txt"), 2, "sheet.txt: expected a name such as out.png"),
        (("sweep", "sheet.png", "--model", "gaussian"), 2, "expected a model with a bank"),
    ],
)
def test_wrong_usage_says_what_is_wrong(
    server: ServerProcess, args: tuple[str, ...], code: int, message: str
) -> None:
    model = () if "--model" in args else ("--model", "zeros")
    shown = els(server, *args, *model)
    assert shown.exit_code == code
    assert message in shown.stderr


def test_windows_are_scaled_at_every_level(client: Client) -> None:
    options: Any = {"model": "valid", "steps": 4, "seed": 1}
    *_, plain = client.sample(**options)
    *_, one = client.sample(**options, window_scale=1.0)
    *_, half = client.sample(**options, window_scale=0.1)
    *_, smallest = client.sample(**options, window=1)
    assert np.array_equal(one.x, plain.x)
    assert np.array_equal(half.x, smallest.x)
    assert not np.array_equal(half.x, plain.x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "zeros", "window_scale": 11.0}, "window_scale: expected 0.1 to 10, or 0, got"),
        ({"model": "wiener", "window_scale": 2.0}, "window_scale: expected 0 for a model without"),
        ({"model": "zeros", "window_scale": 2.0, "window": 3}, "window_scale: expected 0 with"),
    ],
)
def test_a_wrong_scale_is_named(client: Client, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(client.sample(**options))
