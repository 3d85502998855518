import json
import os
import pty
import re
import time
from pathlib import Path
from select import select

import numpy as np
import pytest
from PIL import Image
from tests.support.preloaded import ForkedProcess
from typer.testing import CliRunner, Result

from els_service.cli.bank import app
from els_service.cli.speed import describe_bank_speed
from els_service.denoisers.banks import load_bank, make_bank
from els_service.denoisers.mixed_banks import MixedBank, load_any_bank

GREY = np.arange(6 * 4 * 5, dtype=np.uint8).reshape(6, 4, 5)
LABELS = np.array([1, 0, 1, 3, 0, 1])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    np.savez(path := tmp_path / "pictures.npz", images=GREY, labels=LABELS)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def build(source: Path, *options: object) -> Path:
    result = run("build", source, out := source.with_name("bank.safetensors"), *options)
    assert result.exit_code == 0, result.output
    return out


def assert_refused(result: Result, message: str) -> None:
    """Refused with exit code 2, nothing on stdout and this in one line on stderr."""
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_build_writes_the_bank_that_it_reports(source: Path) -> None:
    result = run("build", source, out := source.with_name("bank.safetensors"))
    assert result.exit_code == 0
    assert load_bank(out).fingerprint[:20] in result.stdout
    assert "1 × 3" in result.stdout


@pytest.mark.alone
def test_build_tells_what_a_step_takes_here(source: Path) -> None:
    result = run("build", source, source.with_name("bank.safetensors"))
    *_, line, _ = result.stdout.splitlines()
    assert line == (
        "an ELS machine over all 6 images: one image takes < 1 ms a step here, "
        "< 1 ms for a sample of 20 steps"
    )


def test_build_ends_with_the_command_that_chooses_windows(source: Path) -> None:
    result = run("build", source, source.with_name("bank.safetensors"))
    assert "els-server calibrate --held-out" in result.stdout.splitlines()[-1]


@pytest.mark.alone
def test_a_dear_bank_is_told_with_what_would_make_it_cheaper() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30_000, 3, 32, 32), np.uint8)
    began = time.monotonic()
    shown = describe_bank_speed(make_bank(pixels))
    assert time.monotonic() - began < 10
    seconds = re.fullmatch(
        r"an ELS machine over all 30000 images: one image takes ([0-9.e+]+) s a step here, "
        r"([0-9.e+]+) (?:s|min) for a sample of 20 steps\. Cheaper: fewer images \(--per-label, "
        r"--limit\), as time grows with their number; smaller ones \(--resize\), .*",
        shown,
    )
    assert seconds is not None, shown
    # Two cores take about ten seconds.
    assert 1 < float(seconds[1]) < 120


def test_build_passes_every_option_on(source: Path) -> None:
    bank = load_bank(
        build(
            source,
            *("--format", "npz", "--label-names", "a, b,c,d", "--per-label", 2, "--limit", 3),
            *("--resize", "7x6", "--source-name", "there", "--licence", "MIT"),
        )
    )
    assert bank.images.shape == (3, 1, 7, 6)
    assert (bank.source, bank.licence, bank.label_names) == ("there", "MIT", ("a", "b"))
    np.testing.assert_array_equal(bank.labels, [0, 1, 1])
    both = load_bank(build(source, "--mirror", "--limit", 2))
    np.testing.assert_array_equal(both.images[1::2], both.images[::2, ..., ::-1])
    assert (len(both), both.source) == (4, f"{source.name}: each image and its mirror image")


def test_build_reads_the_labels_file_it_is_given(tmp_path: Path) -> None:
    (images := tmp_path / "images").write_bytes(bytes((0, 0, 8, 3, *(0, 0, 0, 1) * 3, 9)))
    (labels := tmp_path / "labels").write_bytes(bytes((0, 0, 8, 1, 0, 0, 0, 1, 4)))
    assert load_bank(build(images, "--labels", labels)).label_range(4) == (0, 1)


def test_one_number_resizes_to_a_square(source: Path) -> None:
    assert load_bank(build(source, "--resize", 9)).shape == (1, 9, 9)


def test_the_source_is_named_after_the_file_but_not_its_folder(source: Path) -> None:
    assert load_bank(build(source)).source == "pictures.npz"


def test_info_as_json_tells_all_that_the_bank_knows(source: Path) -> None:
    out = build(source, "--label-names", "a,b,c,d", "--licence", "MIT")
    assert json.loads(run("info", out, "--json").stdout) == {
        "images": 6,
        "shape": [1, 4, 5],
        "dtype": "uint8",
        "labels": [
            {"label": 0, "name": "a", "images": 2},
            {"label": 1, "name": "b", "images": 3},
            {"label": 3, "name": "d", "images": 1},
        ],
        "source": "pictures.npz",
        "licence": "MIT",
        "fingerprint": load_bank(out).fingerprint,
    }


def test_info_prints_brackets_as_they_are_and_says_none(tmp_path: Path) -> None:
    np.savez(source := tmp_path / "flat.npz", images=GREY)
    result = run("info", build(source, "--source-name", "[/red] [1]"))
    assert result.exit_code == 0
    assert "[/red] [1]" in result.stdout
    assert result.stdout.count("none") == 2  # labels and licence


def test_a_source_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (source := tmp_path / "thing").write_bytes(b"GIF89a")
    assert_refused(run("build", source, tmp_path / "bank.safetensors"), "thing: of no known format")
    assert list(tmp_path.iterdir()) == [source]


def test_a_damaged_bank_is_named(source: Path) -> None:
    out = build(source)
    out.write_bytes(out.read_bytes()[:-1])
    assert_refused(run("info", out), "bank.safetensors: not a bank")


def test_a_bank_is_not_written_over_its_source(source: Path) -> None:
    assert_refused(run("build", source, source), "OUT: expected a name that ends in .safetensors")


def test_a_folder_that_is_not_there_is_made(source: Path) -> None:
    out = source.parent / "absent" / "bank.safetensors"
    assert run("build", source, out).exit_code == 0
    assert out.exists()


@pytest.mark.parametrize("size", ["", "x", "4x", "1x2x3", "-4", "4.5", "²"])
def test_an_odd_size_is_refused(source: Path, size: str) -> None:
    result = run("build", source, source.with_suffix(".safetensors"), f"--resize={size}")
    assert_refused(result, "resize: expected HxW or N")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of three pictures, of which one is none, and twelve files of notes."""
    (folder := tmp_path / "pictures").mkdir()
    for name in ("a", "b"):
        Image.new("L", (5, 4)).save(folder / f"{name}.png")
    (folder / "c.png").write_bytes(b"no picture")
    for number in range(12):
        (folder / f"notes-{number:02}.txt").write_text("notes")
    return folder


def test_pictures_that_cannot_be_read_are_skipped_and_counted_where_asked(pictures: Path) -> None:
    out = pictures.with_name("bank.safetensors")
    assert_refused(run("build", pictures, out), "c.png: cannot be read")
    assert not out.exists()
    result = run("build", pictures, out, "--skip-unreadable")
    assert result.exit_code == 0
    assert len(load_bank(out).images) == 2
    first, *_, others, last = result.stderr.splitlines()
    assert first.startswith(f"skipped: {pictures / 'c.png'}: cannot be read")
    assert others == "skipped: … and 3 more"
    assert last == "13 files skipped: cannot be read"


def test_skipping_is_for_folders_of_pictures(source: Path) -> None:
    refused = run("build", source, source.with_name("bank.safetensors"), "--skip-unreadable")
    assert_refused(refused, "skip_unreadable: expected a folder of pictures")


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A folder of two labels with pictures of three sizes."""
    folder = tmp_path / "photographs"
    sizes = {"hills/a.png": (8, 5), "hills/b.png": (5, 8), "sea/c.png": (8, 5), "sea/d.png": (6, 6)}
    for name, size in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (len(name), 2, 3)).save(folder / name)
    return folder


def test_pictures_keep_their_sizes_labels_and_names_where_asked(photographs: Path) -> None:
    out = photographs.with_name("bank.safetensors")
    refused = run("build", photographs, out)
    assert_refused(refused, "b.png: of size and channels (8, 5, 3)")
    result = run("build", photographs, out, "--keep-sizes", "--licence", "CC0")
    assert result.exit_code == 0, result.output
    assert "3 different, heights 5 to 8, widths 5 to 8" in result.stdout
    assert "a model.yaml of this bank has machine: els and sizes: any" in result.stdout
    assert "calibrate" not in result.stdout
    assert "an ELS machine with sizes over all 4 images, for images of 5×8, about:" in result.stdout
    bank = load_any_bank(out)
    assert isinstance(bank, MixedBank)
    assert bank.extents.tolist() == [[5, 8], [8, 5], [5, 8], [6, 6]]
    assert (bank.label_names, bank.licence) == (("hills", "sea"), "CC0")
    assert list(bank.file_names or ()) == ["hills/a.png", "hills/b.png", "sea/c.png", "sea/d.png"]
    facts = json.loads(run("info", out, "--json").stdout)
    assert facts["sizes"] == {
        "height": [5, 8],
        "width": [5, 8],
        "different": 3,
        "most": [
            {"height": 5, "width": 8, "images": 2},
            {"height": 6, "width": 6, "images": 1},
            {"height": 8, "width": 5, "images": 1},
        ],
    }
    assert (facts["images"], facts["shape"], facts["file_names"]) == (4, [3, 5, 8], 4)


def test_pictures_that_keep_one_size_make_the_bank_that_is_built_without(pictures: Path) -> None:
    options = ("--skip-unreadable", "--limit", 2)
    ways = [pictures.with_name(f"{name}.safetensors") for name in ("kept", "plain")]
    assert run("build", pictures, ways[0], "--keep-sizes", *options).exit_code == 0
    assert run("build", pictures, ways[1], *options).exit_code == 0
    assert ways[0].read_bytes() == ways[1].read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resize", "4"], "resize: expected none with --keep-sizes, got 4"),
        (["--crop"], "crop: expected none with --keep-sizes"),
        (["--labels", "x"], "labels: expected none with --keep-sizes"),
        (["--limit", "0"], "limit: expected at least 1, got 0"),
        (["--per-label", "0"], "per_label: expected at least 1, got 0"),
        (["--label-names", "x"], "label_names: expected 2 names, got 1"),
    ],
)
def test_options_that_do_not_go_with_keeping_sizes_are_refused(
    photographs: Path, options: list[str], message: str
) -> None:
    out = photographs.with_name("bank.safetensors")
    assert_refused(run("build", photographs, out, "--keep-sizes", *options), message)
    assert not out.exists()


def test_arrays_and_mixed_channels_keep_no_sizes(source: Path, photographs: Path) -> None:
    out = photographs.with_name("bank.safetensors")
    refused = run("build", source, out, "--keep-sizes")
    assert_refused(refused, "keep_sizes: expected a folder of pictures, as arrays have images of")
    Image.new("L", (5, 4)).save(photographs / "sea" / "grey.png")
    refused = run("build", photographs, out, "--keep-sizes")
    assert_refused(refused, "grey.png: of channels 1, but")


def test_calibration_by_held_out_images_refuses_a_mixed_bank_by_name(photographs: Path) -> None:
    run("build", photographs, photographs.parent / "_banks" / "b.safetensors", "--keep-sizes")
    (folder := photographs.parent / "model").mkdir()
    document = "kind: analytic\nmachine: els\nsizes: any\nbank: ../_banks/b.safetensors\n"
    (folder / "model.yaml").write_text(document)
    from els_service.cli.main import app as server

    result = CliRunner().invoke(server, ["calibrate", "--held-out", str(folder), "--dry-run"])
    assert result.exit_code == 2
    expected = "bank: expected images of one size for calibration by held-out images"
    assert expected in " ".join(result.stderr.split())


@pytest.mark.slow
def test_progress_is_a_bar_on_a_terminal(pictures: Path) -> None:
    for path in (pictures / "c.png", *pictures.glob("*.txt")):
        path.unlink()
    leader, follower = pty.openpty()
    command = ["bank", "build", str(pictures), str(pictures.with_name("bank.safetensors"))]
    variables = os.environ | {"TERM": "xterm", "COLUMNS": "200"}
    process = ForkedProcess(None, command, Path(os.ttyname(follower)), variables)
    shown = b""
    while process.poll() is None or select([leader], [], [], 0)[0]:
        if select([leader], [], [], 0.1)[0]:
            shown += os.read(leader, 1 << 16)
    process.communicate()
    os.close(follower)
    os.close(leader)
    assert process.returncode == 0
    assert f"Reading {pictures}".encode() in shown
    assert b"100%" in shown


@pytest.mark.parametrize(("low", "hinted"), [(0.0, True), (-1.0, False)])
def test_build_hints_at_floats_that_seem_to_be_from_0_to_1(
    tmp_path: Path, low: float, hinted: bool
) -> None:
    images = np.linspace(low, 1, 60, dtype=np.float32).reshape(3, 4, 5)
    np.savez(source := tmp_path / "floats.npz", images=images)
    result = run("build", source, tmp_path / "bank.safetensors")
    assert result.exit_code == 0
    assert ("hint: no pixel is below 0" in result.stderr) == hinted


def test_a_bank_in_parts_is_built_described_and_continued(pictures: Path, tmp_path: Path) -> None:
    options = ("--shard-size", 1, "--skip-unreadable", "--licence", "MIT")
    result = run("build", pictures, out := tmp_path / "parts", *options)
    assert result.exit_code == 0, result.output
    assert result.stderr.endswith("files skipped: cannot be read\n")
    whole = run("build", pictures, one := tmp_path / "one.safetensors", *options[2:])
    assert result.stderr.splitlines()[-1] == whole.stderr.splitlines()[-1]
    for named in (out, out / "manifest.json"):
        shown = json.loads(run("info", named, "--json").stdout)
        assert shown.pop("parts") == shown["images"]
        alone = json.loads(run("info", one, "--json").stdout)
        assert alone.pop("file_names") == shown["images"]
        assert shown == alone
    again = run("build", pictures, out, *options)
    assert_refused(again, "parts: expected an empty folder or an unfinished build, got manifest")
    refused = run("build", pictures, tmp_path / "other", "--shard-size", 1, "--keep-sizes")
    assert_refused(refused, "keep_sizes: expected none with --shard-size, got True")
    part = out / "part-00000.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    assert_refused(run("info", out), "part-00000.safetensors: not a bank")
