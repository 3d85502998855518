"""The command ``els`` against a real server: what it writes, prints and exits with."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.support.models_folder import DOCUMENTS
from tests.support.processes import BIN, ServerProcess, run

from els_client import Client
from els_client.cli import main
from els_proto.build_info import COMMIT


def opened(path: Path) -> tuple[np.ndarray, tuple[int, int], int]:
    """Return pixels, (width, height) and number of frames of a picture."""
    with Image.open(path) as picture:
        return np.asarray(picture), picture.size, getattr(picture, "n_frames", 1)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of the tiny models' size."""
    path = tmp_path_factory.mktemp("pictures") / "in.png"
    grey = np.random.default_rng(0).integers(0, 256, (6, 5)).astype(np.uint8)
    Image.fromarray(grey).save(path)
    return path


def test_both_commands_print_version_and_commit() -> None:
    version = metadata.version("els-denoise")
    for command in ("els", "els-server"):
        done = run(BIN / command, "--version")
        assert (done.returncode, done.stdout) == (0, f"{command} {version} ({COMMIT})\n")


def test_models_are_listed_as_a_table_and_as_json(server: ServerProcess) -> None:
    table = run("els", "--target", server.target, "models")
    assert table.returncode == 0
    assert all(name in table.stdout for name in DOCUMENTS)
    listed = json.loads(run("els", "models", "--json", "--target", server.target).stdout)
    assert [model["name"] for model in listed] == sorted(DOCUMENTS)


def test_denoise_writes_the_picture_that_the_client_would(
    server: ServerProcess, client: Client, picture: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.png"
    shared = ("--target", server.target, "--model", "zeros", "--json")
    done = run("els", "denoise", picture, out, "--sigma", 0.5, "--label", 1, *shared)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["out"], report["model"]) == (str(out), "zeros")
    x = opened(picture)[0][None, None]
    expected = client.denoise(x, model="zeros", sigma=0.5, label=1)[0, 0]
    shown = opened(out)[0].astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(shown, expected.clip(-1, 1), atol=1 / 127.5)


def test_score_writes_the_values_that_the_client_gets(
    server: ServerProcess, client: Client, picture: Path, tmp_path: Path
) -> None:
    out = tmp_path / "score.npy"
    done = run(
        *("els", "--target", server.target, "--model", "ideal"),
        *("score", picture, out, "--sigma", 0.5),
    )
    assert done.returncode == 0, done.stderr
    expected = client.score(opened(picture)[0][None, None], model="ideal", sigma=0.5)
    np.testing.assert_allclose(np.load(out), expected, rtol=1e-6)


def test_sample_writes_a_grid_and_the_way_there(server: ServerProcess, tmp_path: Path) -> None:
    grid, gif = tmp_path / "grid.png", tmp_path / "steps.gif"
    done = run(
        *("els", "--target", server.target, "--model", "zeros", "sample"),
        *("--count", 3, "--label", "0,1,-1", "--seed", 5, "--steps", 4),
        *("--out", grid, "--gif", gif),
    )
    assert done.returncode == 0, done.stderr
    assert opened(grid)[1] > (5, 6)
    assert opened(gif)[2] >= 4


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("--model", "zeros", "denoise", "IN", "OUT", "--sigma", -1), 2, "level.sigma: expected"),
        (("--model", "zeros", "denoise", "IN", "OUT"), 2, "level: expected exactly one"),
        (("--model", "gaussian", "denoise", "IN", "OUT", "--sigma", 1), 2, "32"),
        (("--model", "nobody", "denoise", "IN", "OUT", "--sigma", 1), 3, "expected one of"),
        (("--model", "nobody", "sample"), 3, "expected one of"),
        (("--target", "127.0.0.1:1", "models"), 4, "els: "),
        (("--model", "zeros", "--timeout", 0.001, "sample", "--count", 256), 5, "els: "),
        (("--model", "zeros", "sample", "--steps", 1001), 6, "steps: expected at most 1000"),
        (("--model", "zeros", "sample", "--count", 257), 6, "count: expected at most 256"),
    ],
)
def test_each_failure_has_one_line_and_its_exit_code(
    server: ServerProcess,
    picture: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: tuple[object, ...],
    code: int,
    text: str,
) -> None:
    files = {"IN": picture, "OUT": tmp_path / "out.png"}
    given = [files.get(str(argument), argument) for argument in arguments]
    if "sample" in arguments:
        given += ["--out", tmp_path / "out.png"]
    # In this process: the other tests here start the command.
    monkeypatch.setattr("sys.argv", ["els", "--target", server.target, *map(str, given)])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capfd.readouterr()
    assert (ended.value.code, shown.out) == (code, "")
    assert text in shown.err
    assert shown.err.count("\n") == 1
    assert not (tmp_path / "out.png").exists()


def test_resize_offers_to_fit_another_picture(
    server: ServerProcess, picture: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.png"
    Image.fromarray(opened(picture)[0]).resize((50, 60)).save(large := tmp_path / "large.png")
    asked = ("--target", server.target, "--model", "zeros", "denoise", large, out, "--sigma", 1)
    refused = run("els", *asked)
    assert refused.returncode == 2
    assert "--resize" in refused.stderr
    assert run("els", *asked, "--resize").returncode == 0
    assert opened(out)[1] == (5, 6)
