"""``els remix``: the server that it starts, and the files that it writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.support.fake_pictures import FakePictures
from tests.support.fake_server import served
from typer.testing import CliRunner, Result

from els_client import _embedded as embedded
from els_client import _remix_pictures as drawing
from els_client.cli import app
from els_proto.denoise.v1 import denoise_pb2 as pb

ROOT = Path(__file__).parents[2]
# Prints its process and models folder to ``server.txt``, then serves until SIGTERM.
SERVE = """
import json, os, signal, sys
sys.path.insert(0, {root!r})
models = sys.argv[sys.argv.index("--models") + 1]
with open({folder!r} + "/server.txt", "w") as file:
    print(os.getpid(), models, open(models + "/photo/model.yaml").read(), file=file)
from tests.support.fake_pictures import FakePictures
from tests.support.fake_server import served
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
with served(FakePictures()) as target:
    port = int(target.rpartition(":")[2])
    print(json.dumps({{"event": {event!r}, "grpc_port": port}}), flush=True)
    {then}
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.png")


@pytest.fixture
def target() -> Iterator[str]:
    with served(FakePictures()) as address:
        yield address


def remix(*words: str) -> Result:
    return CliRunner().invoke(app, ["remix", "photo.png", *words])


def program(*, event: str = "ready", then: str = "signal.pause()") -> str:
    return SERVE.format(root=str(ROOT), folder=os.getcwd(), event=event, then=then)


def start_with(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    monkeypatch.setattr(embedded, "SERVER", (sys.executable, "-c", script))


def server_and_folder() -> tuple[int, Path, dict[str, object]]:
    """Return process, models folder and model.yaml of the server that was started."""
    process, folder, document = Path("server.txt").read_text().split(maxsplit=2)
    return int(process), Path(folder), json.loads(document)


def check_gone() -> None:
    process, folder, _ = server_and_folder()
    assert not folder.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


@pytest.mark.slow
def test_a_server_of_the_photograph_is_started_and_gone_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start_with(monkeypatch, program())
    result = remix("--size", "12x8", "--patch", "5", "--sources", "70", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["out"], report["mode"]) == ("remix.png", "new")
    assert report["seconds"] >= report["start_seconds"] + report["draw_seconds"] > 0
    with Image.open("remix.png") as picture:
        assert picture.size == (12, 8)
    _, _, document = server_and_folder()
    expected = {"kind": "picture", "pictures": ["photo.ppm"]}
    assert document == {**expected, "source": "photo.png", "patch": 5, "sources": 70, "finest": 12}
    check_gone()


@pytest.mark.parametrize(("size", "finest"), [("24x16", 24), ("9x9", 14), ("60x9", 14)])
def test_the_photograph_of_a_narrow_picture_holds_a_patch(
    monkeypatch: pytest.MonkeyPatch, size: str, finest: int
) -> None:
    start_with(monkeypatch, program())
    assert remix("--size", size, "--json").exit_code == 0
    _, _, document = server_and_folder()
    # Of 24x16 pixels: reduced to 14, the shorter side is 9, the patch.
    assert document["finest"] == finest


def test_a_server_that_does_not_start_ends_the_command_with_its_last_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start_with(monkeypatch, "import sys; print('no memory', file=sys.stderr); sys.exit(3)")
    result = remix()
    assert result.exit_code == 4
    assert "the server ended with exit code 3; its log ends: no memory" in result.stderr
    assert not list(Path().glob("els-remix-*"))


def test_a_photograph_that_the_server_rejects_is_named_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start_with(monkeypatch, program(event="no model is served"))
    result = remix()
    assert result.exit_code == 2
    assert "the server rejects the photograph: no bank" in result.stderr
    check_gone()


@pytest.mark.slow
def test_an_error_of_a_call_stops_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    start_with(monkeypatch, program())
    result = remix("--size", "129x8")
    assert result.exit_code == 2
    assert "size: expected a width of 3 to 128 pixels, got 129" in result.stderr
    check_gone()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.slow
def test_an_interrupted_command_stops_the_server(number: signal.Signals) -> None:
    # The server interrupts the command as soon as it is ready.
    script = program(then=f"os.kill(os.getppid(), {int(number)}); signal.pause()")
    # A shell's background jobs ignore Ctrl-C, and so would the command.
    command = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from els_client import _embedded as embedded; from els_client.cli import main;"
        f"embedded.SERVER = (sys.executable, '-c', {script!r}); main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", command, "remix", "photo.png"],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 128 + number
    check_gone()


def test_without_the_packages_of_the_server_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(embedded, "_NEEDED", ("els_client", "els_absent"))
    result = remix()
    assert result.exit_code == 4
    assert "pip install 'els-denoise[server]', which has els_absent" in result.stderr
    assert "--target" in result.stderr


def test_a_file_that_is_no_picture_is_rejected_before_a_server_is_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start_with(monkeypatch, "raise SystemExit(9)")
    whole = Path("photo.png").read_bytes()
    Path("photo.png").write_bytes(whole[: len(whole) // 2])
    result = remix()
    assert result.exit_code == 2
    assert "photo.png: " in result.stderr


def test_several_pictures_are_a_grid_and_files_of_their_own(target: str) -> None:
    result = remix("--count", "3", "--out", "many.png", "--target", target, "--size", "120x80")
    assert result.exit_code == 0, result.output
    for name in ("many.png", "many-0.png", "many-1.png", "many-2.png"):
        assert name in result.stdout
    with Image.open("many.png") as grid, Image.open("many-2.png") as last:
        assert grid.size == (240, 160)
        assert last.size == (120, 80)


def test_the_gif_has_the_steps_of_all_scales_at_the_size_of_the_result(target: str) -> None:
    result = remix("--gif", "steps.gif", "--size", "120x80", "--target", target)
    assert result.exit_code == 0, result.output
    with Image.open("steps.gif") as gif:
        sizes = []
        for frame in range(getattr(gif, "n_frames", 1)):
            gif.seek(frame)
            sizes.append(gif.size)
    assert sizes == [(120, 80)] * 6


def test_sources_are_drawn_beside_the_result(target: str) -> None:
    result = remix("--explain", "--out", "new.png", "--target", target)
    assert result.exit_code == 0, result.output
    assert "new-sources.png" in result.stdout
    with Image.open("new-sources.png") as sheet:
        pixels = np.asarray(sheet)
    # Each pixel came from its own place: the mosaic is the colours of the photograph itself.
    scale = 192 // 12
    left = drawing.MARGIN + 12 * scale + drawing.GAP
    mosaic = pixels[drawing.MARGIN :, left:][: 8 * scale : scale, : 12 * scale : scale]
    rows, cols = np.indices((8, 12))
    np.testing.assert_array_equal(mosaic, drawing.coordinate_colours(rows, cols, (8, 12)))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--size", "12"], "size: expected WIDTHxHEIGHT in pixels, got 12"),
        (["--gif", "steps.png"], "gif: expected a name that ends in .gif"),
        (["--out", "new.txt"], "new.txt: expected a name such as out.png"),
        (["--patch", "5"], "patch: expected none with --target"),
        (["--sources", "70"], "sources: expected none with --target"),
        (["--model", "rgb"], "model: expected one of kind picture"),
        (["--model", "part", "--explain"], "explain: part has no sources to name"),
        (["--mode", "wider", "--size", "8x8"], "size: expected wider proportions"),
    ],
)
def test_wrong_options_are_rejected_with_a_reason(
    target: str, words: list[str], reason: str
) -> None:
    result = remix("--target", target, *words)
    assert result.exit_code == 2
    assert reason in result.stderr


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--mode", "inpaint"], "mask: expected one for mode inpaint, got none"),
        (["--strength", "0.5"], "strength: expected none for mode new"),
        (["--model", "street"], "model: expected none without --target"),
    ],
)
def test_wrong_options_are_rejected_before_a_server_is_started(
    monkeypatch: pytest.MonkeyPatch, words: list[str], reason: str
) -> None:
    start_with(monkeypatch, "raise SystemExit(9)")
    result = remix(*words)
    assert result.exit_code == 2
    assert reason in result.stderr


def test_a_photograph_smaller_than_a_patch_is_rejected_before_a_server_is_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start_with(monkeypatch, "raise SystemExit(9)")
    for words, patch in (((), 9), (("--patch", "7"), 7)):
        Image.new("RGB", (patch, patch - 1)).save("photo.png")
        result = remix(*words)
        assert result.exit_code == 2
        expected = f"photo.png: expected sides of at least {patch} pixels, the patch"
        assert f"{expected}, got {patch}x{patch - 1}" in result.stderr


def test_the_target_may_come_from_the_environment(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_with(monkeypatch, "raise SystemExit(9)")
    monkeypatch.setenv("ELS_TARGET", target)
    result = remix("--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["model"] == "street"


def test_mask_and_sketch_reach_the_server() -> None:
    fake = FakePictures()
    mask = np.zeros((16, 24), np.uint8)
    mask[4:12, 4:12] = 255
    Image.fromarray(mask).save("mask.png")
    with served(fake) as target:
        result = remix("--mode", "inpaint", "--mask", "mask.png", "--target", target)
        assert result.exit_code == 0, result.output
        words = ["--start", "photo.png", "--strength", "0.4"]
        result = remix("--mode", "edit", *words, "--target", target)
        assert result.exit_code == 0, result.output
    inpainted, edited = (one for one in fake.requests if isinstance(one, pb.SampleRequest))
    assert inpainted.HasField("mask")
    assert np.frombuffer(inpainted.mask.data, "<f4").sum() == 16
    assert edited.start_time == pytest.approx(0.4)


def test_colours_of_places_change_smoothly_between_four_corners() -> None:
    rows, cols = np.indices((20, 30))
    colours = drawing.coordinate_colours(rows, cols, (20, 30)).astype(int)
    corners = colours[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert len({tuple(one) for one in corners.tolist()}) == 4
    assert abs(np.diff(colours, axis=0)).max() < 20
    assert abs(np.diff(colours, axis=1)).max() < 20
    # Every place has a colour of its own.
    assert len({tuple(one) for one in colours.reshape(-1, 3).tolist()}) == 600


def test_captions_wider_than_their_pictures_are_not_cut() -> None:
    # Of 100 pixels, which are not enlarged: less than the caption below the mosaic needs.
    results, places = np.zeros((1, 3, 20, 100), np.float32), np.zeros((1, 20, 100, 3), np.int64)
    sheet = np.asarray(drawing.sources_sheet(results, places, [results[0]]))
    assert (sheet[:, -drawing.MARGIN :] == sheet[0, 0]).all()
    assert sheet.shape[1] > 2 * 100 + drawing.GAP + 2 * drawing.MARGIN


def test_a_pixel_without_a_source_is_black() -> None:
    none = np.full((1, 1), -1)
    assert not drawing.coordinate_colours(none, none, (4, 4)).any()
