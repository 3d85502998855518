"""Models of kind ``picture``: their files, keys and sizes, and the command that makes them."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.support.pictures import DEEP
from typer.testing import CliRunner

from els_service.cli.main import app
from els_service.denoisers.base import make_query
from els_service.denoisers.file_names import FileNames
from els_service.denoisers.levels import from_sigma
from els_service.errors import LoadError
from els_service.repository import ModelRepository


def photo(path: Path, height: int = 40, width: int = 60, mode: str = "RGB") -> Path:
    row, col = np.mgrid[0:height, 0:width]
    pixels = np.stack([row * 4 % 256, col * 3 % 256, (row + col) * 5 % 256], -1).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def model(
    root: Path, keys: str = "", name: str = "model", size: tuple[int, int] = (40, 60)
) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    photo(folder / "photo.png", *size)
    (folder / "model.yaml").write_text(f"kind: picture\npictures: [photo.png]\n{keys}")
    return folder


def refusal(root: Path) -> str:
    with pytest.raises(LoadError) as caught:
        ModelRepository(root).load("model")
    return str(caught.value)


def test_a_picture_has_scales_from_its_patch_and_its_size(tmp_path: Path) -> None:
    model(tmp_path, size=(400, 600))
    info = ModelRepository(tmp_path).load("model").info
    assert info.kind == "picture"
    assert info.shape == (3, 128, 192)
    assert info.scales == ((14, 21), (29, 44), (61, 92), (128, 192))
    assert info.label_names == ("14x21", "29x44", "61x92", "128x192")
    assert info.bank is not None
    assert info.bank.source == "photo.png"
    pixels = sum(height * width for height, width in info.scales)
    names = FileNames.of(["photo.png"] * 4)
    assert info.memory_bytes == 4 * 3 * pixels + names.nbytes


def test_keys_choose_patch_scales_and_sizes(tmp_path: Path) -> None:
    keys = "patch: 5\nscales: 2\ncoarsest: 10\nfinest: 30\nfold: uniform\nsteps: 4\n"
    model(tmp_path, f"{keys}source: a street\nlicence: CC0\n")
    info = ModelRepository(tmp_path).load("model").info
    assert info.scales == ((10, 15), (20, 30))
    assert (info.fold, info.scale_steps) == (np.inf, 4)
    assert info.bank is not None
    assert (info.bank.source, info.bank.licence) == ("a street", "CC0")


def test_several_pictures_of_unequal_sizes_answer_together(tmp_path: Path) -> None:
    folder = model(tmp_path)
    photo(folder / "second.png", 30, 30)
    document = "kind: picture\npictures: [photo.png, second.png]\npatch: 5\n"
    (folder / "model.yaml").write_text(document)
    both = ModelRepository(tmp_path).load("model")
    assert both.info.bank is not None
    assert both.info.bank.images == 2
    x = np.zeros((1, 3, 9, 9), np.float32)
    alone = model(tmp_path, "patch: 5\n", "alone")
    one = ModelRepository(tmp_path).load(alone.name)
    query = make_query(x, from_sigma([1.0]), 0)
    assert not np.array_equal(both.denoise(query).pixels, one.denoise(query).pixels)


def test_the_fingerprint_changes_with_the_picture(tmp_path: Path) -> None:
    folder = model(tmp_path)
    models = ModelRepository(tmp_path)
    first = models.load("model").info.bank
    before = models.fingerprint("model")
    photo(folder / "photo.png", 41, 60)
    second = models.load("model").info.bank
    assert first is not None
    assert second is not None
    assert first.fingerprint != second.fingerprint
    assert models.fingerprint("model") != before


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ("patch: 8\n", "patch: expected an odd number, got 8"),
        ("patch: 1\n", "patch"),
        ("coarsest: 5\n", "coarsest: expected at least 9, the patch, got 5"),
        ("fold: 0\n", "fold"),
        ("steps: 1\n", "steps"),
        ("finest: 8\n", "sides of at least 9 pixels, the patch, got 5 x 8"),
        ("pictures: []\n", "pictures"),
        ("scales: 9\n", "scales"),
        ("sources: 0\n", "sources"),
        ("seed: -1\n", "seed"),
    ],
)
def test_a_key_out_of_range_is_refused_by_name(tmp_path: Path, keys: str, reason: str) -> None:
    model(tmp_path, keys)
    assert reason in refusal(tmp_path)


def test_transparent_damaged_animated_and_absent_pictures_are_refused_by_name(
    tmp_path: Path,
) -> None:
    folder = model(tmp_path)
    whole = (folder / "photo.png").read_bytes()
    for mode, reason in [("RGBA", "transparency"), ("CMYK", "mode CMYK"), ("P", "mode P")]:
        suffix = "jpg" if mode == "CMYK" else "png"
        document = f"kind: picture\npictures: [other.{suffix}]\n"
        (folder / "model.yaml").write_text(document)
        photo(folder / f"other.{suffix}", mode=mode)
        text = refusal(tmp_path)
        assert f"other.{suffix}" in text
        assert reason in text
    frames = [Image.fromarray(np.full((20, 20, 3), v, np.uint8)) for v in (0, 200)]
    frames[0].save(folder / "other.png", save_all=True, append_images=frames[1:])
    (folder / "model.yaml").write_text("kind: picture\npictures: [other.png]\n")
    assert "expected one frame" in refusal(tmp_path)
    (folder / "other.png").write_bytes(whole[: len(whole) // 2])
    assert "cannot be read" in refusal(tmp_path)
    (folder / "other.png").unlink()
    assert "expected a file, found none" in refusal(tmp_path)


def test_grey_and_colour_pictures_are_not_mixed(tmp_path: Path) -> None:
    folder = model(tmp_path)
    photo(folder / "grey.png", mode="L")
    (folder / "model.yaml").write_text("kind: picture\npictures: [photo.png, grey.png]\n")
    assert "expected all grey or all RGB" in refusal(tmp_path)


def test_a_picture_is_turned_by_its_exif_orientation(tmp_path: Path) -> None:
    folder = model(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(folder / "photo.png") as picture:
        picture.save(folder / "photo.png", exif=exif)
    assert ModelRepository(tmp_path).load("model").info.shape == (3, 60, 40)


def add(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["picture", "add", *words])
    return result.exit_code, result.output


def test_picture_add_makes_a_model_that_loads(tmp_path: Path) -> None:
    file, models = photo(tmp_path / "Street one.png"), tmp_path / "models"
    code, output = add(str(file), "street", "--models", str(models), "--patch", "5")
    assert code == 0, output
    assert "scales 8x12, 18x27, 40x60" in output
    assert ModelRepository(models).load("street").info.scale_steps == 10
    code, output = add(str(file), "street", "--models", str(models))
    assert code == 2
    assert "expected no such model, found one" in output


def test_a_part_of_the_patches_is_a_model_of_its_own_whose_error_is_printed(tmp_path: Path) -> None:
    file, models = photo(tmp_path / "street.png"), tmp_path / "models"
    words = [str(file), "--models", str(models), "--patch", "5"]
    code, output = add(*words[:1], "all", *words[1:])
    assert code == 0, output
    assert "differs" not in output
    code, output = add(*words[:1], "part", *words[1:], "--sources", "700", "--seed", "3")
    assert code == 0, output
    # 32, 322 and 2016 patches; two strips of 560 would be more than 700.
    assert "32, 322, 560 patches of its scales: D differs from that of all patches by" in output
    assert "% of its norm at α = 0.25, 0.5, 0.75" in output
    whole, part = (ModelRepository(models).load(name).info for name in ("all", "part"))
    assert whole.bank is not None
    assert part.bank is not None
    assert whole.bank.fingerprint != part.bank.fingerprint
    assert whole.scales == part.scales


def frames(suffix: str) -> bytes:
    """Two frames."""
    pictures = [Image.fromarray(np.full((20, 20, 3), v, np.uint8)) for v in (0, 200)]
    out = BytesIO()
    pictures[0].save(out, suffix, save_all=True, append_images=pictures[1:])
    return out.getvalue()


def encoded(picture: Image.Image, suffix: str, keep: float = 1.0, **options: Any) -> bytes:
    """The bytes of a picture's file, or a part of them."""
    out = BytesIO()
    picture.save(out, suffix, **options)
    return out.getvalue()[: round(keep * len(out.getvalue()))]


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
PALETTE = NOISE.quantize(8)
CLEAR = Image.fromarray(np.full((40, 60, 4), 100, np.uint8))
BAD = {
    "cmyk.jpg": (
        encoded(NOISE.convert("CMYK"), "jpeg"),
        "mode CMYK, expected L (8-bit grey) or RGB",
    ),
    "planes-16.tiff": (DEEP["planes.tiff"], "expected 8 bits a channel, got 16"),
    "floats.tiff": (encoded(Image.new("F", (60, 40)), "tiff"), "mode F, expected L"),
    "moving.webp": (frames("webp"), "expected one frame: save the one that is meant"),
    "moving.gif": (frames("gif"), "cannot identify image; expected one of BMP, JPEG, PNG"),
    "palette-alpha.png": (encoded(PALETTE, "png", transparency=1), "mode P, expected L"),
    "alpha.webp": (encoded(CLEAR, "webp"), "mode RGBA, expected L"),
    "cut.jpg": (encoded(NOISE, "jpeg", 0.6), "cannot be read: "),
    "cut.png": (encoded(NOISE, "png", 0.6), "cannot be read: "),
    "cut.webp": (encoded(NOISE, "webp", 0.6), "cannot be read: "),
    "empty.png": (b"", "cannot be read: "),
    "huge.ppm": (b"P6 9000 9000 255\n", "expected at most 67108864 pixels, got 81000000"),
    "vast.ppm": (b"P6 90000 90000 255\n", "expected at most 67108864 pixels, got more"),
    "small.png": (
        encoded(NOISE.crop((0, 0, 60, 8)), "png"),
        "sides of at least 9 pixels, the patch, got 8 x 60",
    ),
}
"""Name of a file → its content, and what its refusal says."""


@pytest.mark.parametrize("name", BAD)
def test_a_picture_that_is_no_plain_photograph_is_refused_by_name(
    tmp_path: Path, name: str
) -> None:
    content, reason = BAD[name]
    (tmp_path / name).write_bytes(content)
    code, output = add(str(tmp_path / name), "street", "--models", str(tmp_path / "models"))
    assert code == 2
    assert output.startswith("error: ")
    assert reason in output
    assert name in output or name == "small.png"
    assert not list((tmp_path / "models").iterdir())


TALL = np.random.default_rng(1).integers(0, 65536, (40, 30), np.uint16)


@pytest.mark.parametrize(
    ("name", "content", "word", "pixels"),
    [
        ("palette.png", encoded(PALETTE, "png"), "mode P", np.asarray(PALETTE.convert("RGB"))),
        ("deep.png", encoded(Image.fromarray(TALL), "png"), "16 bits", np.rint(TALL / 257)),
        ("opaque.png", encoded(NOISE.convert("RGBA"), "png"), "mode RGBA", np.asarray(NOISE)),
        (
            "deep.ppm",
            b"P6 10 40 65535\n" + TALL.astype(">u2").tobytes(),
            "16 bits",
            np.rint(TALL.reshape(40, 10, 3) / 257),
        ),
    ],
)
def test_what_pillow_converts_faithfully_is_converted_with_a_word(
    tmp_path: Path, name: str, content: bytes, word: str, pixels: np.ndarray[Any, Any]
) -> None:
    (tmp_path / name).write_bytes(content)
    code, output = add(str(tmp_path / name), "street", "--models", str(tmp_path / "models"))
    assert code == 0, output
    assert f"{name}: converted from {word}" in output
    with Image.open(tmp_path / "models" / "street" / f"{Path(name).stem}.png") as stored:
        np.testing.assert_array_equal(np.asarray(stored), pixels)


def test_picture_add_leaves_nothing_of_a_failure(tmp_path: Path) -> None:
    file, models = tmp_path / "clear.png", tmp_path / "models"
    CLEAR.save(file)
    for words in ([str(file), "clear"], [str(tmp_path / "absent.png"), "clear"]):
        code, output = add(*words, "--models", str(models))
        assert code == 2
        assert output.startswith("error: ")
        assert not list(models.iterdir())
    for name in ("../up", "_hidden", ".hidden"):
        code, output = add(str(file), name, "--models", str(models))
        assert code == 2
        assert "NAME: expected" in output
