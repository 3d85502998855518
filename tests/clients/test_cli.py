from __future__ import annotations

import dataclasses
import json
import re
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.support.fake_server import FakeDenoiser
from typer.testing import CliRunner, Result

from els_client import Client
from els_client import _terminal as terminal
from els_client.cli import app
from els_proto.build_info import COMMIT
from els_proto.denoise.v1 import denoise_pb2 as pb

GREY = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(GREY).save("in.png")


def els(*args: str) -> Result:
    return CliRunner().invoke(app, args, catch_exceptions=False)


def drawn(fake: FakeDenoiser) -> list[pb.SampleRequest]:
    return [one for one in fake.requests if isinstance(one, pb.SampleRequest)]


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_version_tells_version_and_commit() -> None:
    assert els("--version").output == f"els {metadata.version('els-denoise')} ({COMMIT})\n"


def test_help_documents_the_exit_codes() -> None:
    assert "3 no such model" in els("--help").output


def test_models_are_a_table_or_json(target: str) -> None:
    shown = els("models", "--target", target).stdout
    (row,) = (line.split() for line in shown.splitlines() if "fashion-els" in line)
    assert row[-4:] == ["0.25", "s", "5", "s"]
    first, second = json.loads(els("models", "--target", target, "--json").stdout)
    assert (first["name"], first["bank"]["images"]) == ("fashion-els", 7)
    assert second["window"] is None


def test_shared_options_stand_before_or_after_the_command(target: str, fake: FakeDenoiser) -> None:
    before = els("--target", target, "--json", "--model", "rgb", "sample", "--steps", "1")
    after = els("sample", "--steps", "1", "--target", target, "--json", "--model", "rgb")
    assert json.loads(before.stdout)["model"] == json.loads(after.stdout)["model"] == "rgb"
    first, second = drawn(fake)
    assert first == second


def test_denoise_sends_the_bytes_of_the_picture_and_writes_the_answer(
    target: str, fake: FakeDenoiser
) -> None:
    result = els(
        *("denoise", "in.png", "out.png", "--sigma", "0.5", "--label", "1", "--window", "3"),
        *("--target", target, "--json"),
    )
    assert result.exit_code == 0
    assert json.loads(result.stdout)["out"] == "out.png"
    request = fake.requests[-1]
    assert isinstance(request, pb.DenoiseRequest)
    assert (request.x.dtype, request.x.data) == (pb.DTYPE_U8, GREY.tobytes())
    assert request.level == pb.NoiseLevel(sigma=[0.5])
    assert (list(request.labels), list(request.windows)) == ([1], [3])
    # The answer is twice as far from mid-grey: each pixel lies halfway between two bytes.
    np.testing.assert_allclose(pixels("out.png"), np.clip(2.0 * GREY - 127.5, 0, 255), atol=0.6)


def test_the_model_decides_between_grey_and_colour(target: str, fake: FakeDenoiser) -> None:
    assert (
        els(
            *("denoise", "in.png", "out.png", "--time", "0.5", "--model", "rgb", "--target", target)
        ).exit_code
        == 0
    )
    request = fake.requests[-1]
    assert isinstance(request, pb.DenoiseRequest)
    assert list(request.x.shape) == [1, 3, 4, 6]
    assert pixels("out.png").shape == (4, 6, 3)


def test_another_size_is_refused_with_the_size_it_should_be_unless_resized(target: str) -> None:
    Image.new("L", (64, 48)).save("large.png")
    args = ("denoise", "large.png", "out.png", "--sigma", "1", "--target", target)
    refused = els(*args)
    assert refused.exit_code == 2
    assert "64 × 48" in refused.stderr
    assert "6 × 4" in refused.stderr
    assert "--resize" in refused.stderr
    assert els(*args, "--resize").exit_code == 0
    assert pixels("out.png").shape == (4, 6)


def test_a_score_is_exact_as_npy_and_symmetric_as_a_picture(target: str) -> None:
    args = ("--alpha-bar", "0.5", "--target", target)
    assert els("score", "in.png", "out.npy", *args).exit_code == 0
    score = np.load("out.npy")
    np.testing.assert_array_equal(score, -(GREY[None, None] / 127.5 - 1).astype(np.float32))
    assert els("score", "in.png", "out.png", *args).exit_code == 0
    expected = np.rint((score[0, 0] / np.abs(score).max() + 1) * 127.5)
    np.testing.assert_array_equal(pixels("out.png"), expected)


def test_sample_writes_a_grid_and_the_way_there(target: str, fake: FakeDenoiser) -> None:
    result = els(
        *("sample", "--label", "0,1", "--label", "1", "--seed", "7", "--steps", "5"),
        *("--sampler", "heun", "--churn", "2", "--out", "grid.png", "--gif", "steps.gif"),
        *("--target", target, "--json"),
    )
    answer = json.loads(result.stdout)
    assert (answer["count"], answer["gif"]) == (3, "steps.gif")
    request = fake.requests[-1]
    assert isinstance(request, pb.SampleRequest)
    assert (list(request.labels), request.count, request.seed) == ([0, 1, 1], 3, 7)
    assert (request.sampler, request.churn) == (pb.SAMPLER_HEUN, 2.0)
    grid = pixels("grid.png")
    height, width = grid.shape
    assert (height % 8, width % 12) == (0, 0)
    # Three images of value 1 in a square of four: the last is empty.
    assert (grid[0, 0], grid[0, -1], grid[-1, 0], grid[-1, -1]) == (255, 255, 255, 0)
    with Image.open("steps.gif") as gif:
        # Pillow gives it to pictures of several frames alone.
        assert gif.n_frames == 5  # type: ignore[attr-defined]


def test_eta_is_left_to_the_server_unless_given(target: str, fake: FakeDenoiser) -> None:
    els("sample", "--sampler", "ddpm", "--target", target)
    els("sample", "--sampler", "ddpm", "--eta", "0", "--target", target)
    unset, zero = drawn(fake)
    assert isinstance(unset, pb.SampleRequest)
    assert isinstance(zero, pb.SampleRequest)
    assert (unset.HasField("eta"), zero.HasField("eta")) == (False, True)


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("sample", "--model", "missing"), 3),
        (("sample", "--model", "slow", "--timeout", "0.05"), 5),
        (("sample", "--model", "busy"), 6),
        (("sample", "--model", "broken"), 1),
        (("sample", "--model", "picky"), 2),
        (("sample", "--label", "boot"), 2),
        (("sample", "--out", "grid.unknown"), 2),
        (("sample", "--out", "no/such/folder/grid.png"), 2),
        (("denoise", "in.png", "out.png"), 2),
        (("denoise", "in.png", "out.png", "--sigma", "1", "--time", "1"), 2),
        (("denoise", __file__, "out.png", "--sigma", "1"), 2),
    ],
)
def test_a_failure_is_one_line_on_stderr_and_an_exit_code(
    target: str, args: tuple[str, ...], code: int
) -> None:
    result = els("--target", target, *args)
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.startswith("els: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
def test_no_server_has_its_own_exit_code() -> None:
    result = els("models", "--target", "127.0.0.1:1")
    assert result.exit_code == 4
    assert result.stderr.startswith("els: nothing listens at 127.0.0.1:1. Is els-server running?")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("args", [("denoise", "none.png", "out.png"), ("sample", "--steps", "0")])
def test_wrong_usage_is_exit_code_two(args: tuple[str, ...]) -> None:
    assert els(*args).exit_code == 2


@pytest.mark.parametrize("given", ["nan", "inf", "0", "-1", "1e9"])
def test_a_deadline_out_of_range_is_wrong_usage(given: str) -> None:
    for command in (("models",), ("sample", "--out", "x.png"), ("repository", "index")):
        result = els(*command, "--target", "127.0.0.1:1", "--timeout", given)
        assert result.exit_code == 2
        assert "timeout" in result.stderr


def test_models_are_legible_in_eighty_columns(
    target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Client(target) as client:
        (first, *_) = client.models()
    long = dataclasses.replace(first, name="mnist-resnet-48-circular", machine="equivariant")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    terminal.list_models([first, long], as_json=False)
    shown, hint = capsys.readouterr()
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines()
    assert max(map(len, lines)) <= 80
    (row,) = (line.split() for line in lines if long.name in line)
    assert row[:3] == [long.name, "equivariant", "×".join(map(str, long.shape))]
    assert "…" not in shown
    assert hint.startswith("columns omitted for lack of width: padding")
    monkeypatch.delenv("FORCE_COLOR")
    terminal.list_models([first, long], as_json=False)
    assert "padding" in capsys.readouterr().out


def test_sample_takes_its_picture_as_denoise_does(target: str, tmp_path: Path) -> None:
    options = ("--steps", "1", "--target", target)
    els("sample", str(tmp_path / "drawn.png"), *options)
    assert (tmp_path / "drawn.png").exists()
    both = els("sample", str(tmp_path / "a.png"), "--out", str(tmp_path / "b.png"), *options)
    assert (both.exit_code, "expected one name" in both.stderr) == (2, True)


def test_denoise_checks_the_name_of_its_picture_before_it_asks(target: str, tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "in.png")
    out = tmp_path / "none" / "out.png"
    done = els("denoise", str(tmp_path / "in.png"), str(out), "--sigma", "1", "--target", target)
    assert (done.exit_code, "expected an existing folder" in done.stderr) == (2, True)


@pytest.mark.parametrize("name", ["a.fits", "a.h5", "a.mpeg", "a.npz", "a", "none/a.png"])
@pytest.mark.parametrize(
    "command", [("denoise", "in.png", "OUT"), ("score", "in.png", "OUT"), ("sample", "OUT")]
)
def test_a_name_that_no_picture_can_have_is_refused_before_the_server_computes(
    target: str, fake: FakeDenoiser, command: tuple[str, ...], name: str
) -> None:
    level = () if command[0] == "sample" else ("--sigma", "1", "--resize")
    words = [name if word == "OUT" else word for word in command]
    done = els(*words, *level, "--target", target)
    assert (done.exit_code, f"els: {name}: expected" in done.stderr) == (2, True)
    assert fake.requests == []


def test_a_gif_is_written_to_a_name_that_says_so(target: str, fake: FakeDenoiser) -> None:
    done = els("sample", "a.png", "--gif", "a.png", "--target", target)
    assert (done.exit_code, "ends in .gif, got a.png" in done.stderr) == (2, True)
    assert drawn(fake) == []


def test_a_model_whose_images_are_no_pictures_is_refused_before_it_draws(
    target: str, fake: FakeDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(target) as client:
        model = dataclasses.replace(client.model("fashion-els"), channels=4)
    monkeypatch.setattr(Client, "model", lambda self, name: model)
    done = els("sample", "a.png", "--target", target)
    assert (done.exit_code, "1 or 3 channels, the model 4" in done.stderr) == (2, True)
    assert drawn(fake) == []
