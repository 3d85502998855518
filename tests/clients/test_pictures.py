from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.support.pictures import DEEP, KEYED, write

from els_client import InvalidArgumentError
from els_client import _pictures as pictures

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_read_is_the_picture_written(tmp_path: Path, channels: int) -> None:
    shape = (channels, 5, 7)
    x = RNG.integers(0, 256, shape, dtype=np.uint8)
    pictures.write(tmp_path / "a.png", (x / 127.5 - 1).astype(np.float32))
    np.testing.assert_array_equal(pictures.read(tmp_path / "a.png", shape, resize=False)[0], x)


def test_pixels_outside_the_range_are_clipped(tmp_path: Path) -> None:
    pictures.write(tmp_path / "a.png", np.array([[[-9, -1, 1, 9]]], np.float32))
    read = pictures.read(tmp_path / "a.png", (1, 1, 4), resize=False)
    assert read.ravel().tolist() == [0, 0, 255, 255]


def test_resizing_crops_about_the_centre_and_keeps_proportions(tmp_path: Path) -> None:
    wide = np.zeros((8, 16), np.uint8)
    wide[:, 4:12] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    read = pictures.read(tmp_path / "wide.png", (1, 4, 4), resize=True)
    # Bicubic filtering reaches a little over the crop; a squeezed picture would have black sides.
    np.testing.assert_allclose(read, 200, atol=20)


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_pictures_of_more_than_eight_bits_are_refused_not_clipped(
    tmp_path: Path, mode: str
) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / "deep.tiff")
    with pytest.raises(InvalidArgumentError, match=f"expected 8 bits a channel, got {mode}"):
        pictures.read(tmp_path / "deep.tiff", (1, 4, 4), resize=False)


def save_turned(path: Path, pixels: np.ndarray, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)


def test_pictures_are_turned_as_their_exif_orientation_says(tmp_path: Path) -> None:
    x = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
    save_turned(tmp_path / "a.png", x, 6)
    read = pictures.read(tmp_path / "a.png", (1, 7, 5), resize=False)
    np.testing.assert_array_equal(read[0, 0], np.rot90(x, -1))
    with pytest.raises(InvalidArgumentError, match="has 5 × 7 pixels"):
        pictures.read(tmp_path / "a.png", (1, 5, 7), resize=False)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_animations_are_refused_with_what_to_do(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("L", (4, 4), value) for value in (0, 255)]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(InvalidArgumentError, match=r"a\..*: expected one frame, got 2: save the"):
        pictures.read(tmp_path / f"a.{suffix}", (1, 4, 4), resize=False)


def test_of_the_pictures_that_a_camera_stores_in_one_file_the_first_is_read(
    tmp_path: Path,
) -> None:
    first, second = Image.new("RGB", (4, 4), (200, 200, 200)), Image.new("RGB", (4, 4))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    assert pictures.read(tmp_path / "a.jpg", (3, 4, 4), resize=False).min() > 150


def test_transparency_is_refused_but_a_channel_of_it_that_hides_nothing_is_not(
    tmp_path: Path,
) -> None:
    Image.new("RGBA", (4, 4), (9, 9, 9, 254)).save(tmp_path / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png", transparency=(0, 0, 0))
    for name in ("a", "b"):
        with pytest.raises(InvalidArgumentError, match=rf"{name}\.png: expected no transparency"):
            pictures.read(tmp_path / f"{name}.png", (3, 4, 4), resize=False)
    Image.new("RGBA", (4, 4), (9, 9, 9, 255)).save(tmp_path / "a.png")
    assert (pictures.read(tmp_path / "a.png", (3, 4, 4), resize=False) == 9).all()


@pytest.mark.parametrize("side", [8200, 20_000])
def test_a_picture_that_announces_too_many_pixels_is_refused_before_it_is_decoded(
    tmp_path: Path, side: int
) -> None:
    # PPM: a header alone.
    (tmp_path / "a.ppm").write_bytes(b"P5 %d %d 255\n" % (side, side))
    with pytest.raises(InvalidArgumentError, match=r"a\.ppm: expected at most 67108864 pixels"):
        pictures.read(tmp_path / "a.ppm", (1, 4, 4), resize=True)


def test_a_model_of_two_channels_has_no_pictures(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="1 or 3 channels, the model 2"):
        pictures.read(tmp_path / "a.png", (2, 4, 4), resize=False)
    with pytest.raises(InvalidArgumentError, match="1 or 3 channels, the model 2"):
        pictures.write(tmp_path / "a.png", np.zeros((2, 4, 4), np.float32))


def test_a_score_of_zero_is_mid_grey(tmp_path: Path) -> None:
    pictures.write_score(tmp_path / "a.png", np.zeros((1, 1, 2, 2), np.float32))
    assert (pictures.read(tmp_path / "a.png", (1, 2, 2), resize=False) == 128).all()


def test_the_grid_goes_row_by_row(tmp_path: Path) -> None:
    images = np.full((3, 1, 200, 200), -1.0, np.float32)
    images[1] = 1.0
    pictures.write_grid(tmp_path / "a.png", images)
    read = pictures.read(tmp_path / "a.png", (1, 400, 400), resize=False)[0, 0]
    assert (read[:200, 200:] == 255).all()
    assert read.astype(int).sum() == 255 * 200 * 200


@pytest.mark.parametrize("name", DEEP)
def test_colour_of_sixteen_bits_is_refused_not_cut(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, DEEP, name)
    with pytest.raises(InvalidArgumentError, match=r"expected 8 bits a channel, got 16"):
        pictures.read(path, (3, 2, 2), resize=True)


@pytest.mark.parametrize("name", DEEP)
def test_colour_of_sixteen_bits_is_cut_with_a_word_where_pillow_reads_it(
    tmp_path: Path, name: str
) -> None:
    path, words = write(tmp_path, DEEP, name), list[str]()
    if name == "planes.tiff":  # Pillow takes the bytes of one plane for its pixels.
        with pytest.raises(InvalidArgumentError, match=r"expected 8 bits a channel, got 16"):
            pictures.opened(path, words.append)
        return
    assert pictures.opened(path, words.append).mode == "RGB"
    assert words == [f"{path}: reduced from 16 bits a channel to 8"]


def test_grey_of_sixteen_bits_is_rounded_to_eight(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 256], [385, 386, 65406, 65535]], np.uint16)
    nearest, words = np.rint(values / 257).astype(np.uint8), list[str]()
    for suffix in ("png", "tiff"):
        Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    (tmp_path / "a.pgm").write_bytes(b"P5 4 2 65535\n" + values.astype(">u2").tobytes())
    for suffix in ("png", "tiff", "pgm"):
        read = pictures.opened(tmp_path / f"a.{suffix}", words.append)
        np.testing.assert_array_equal(np.asarray(read), nearest)
    assert len(words) == 3


def test_pictures_of_floats_are_refused_even_if_sixteen_bits_are_not(tmp_path: Path) -> None:
    Image.new("F", (4, 4)).save(tmp_path / "a.tiff")
    with pytest.raises(InvalidArgumentError, match="expected 8 bits a channel, got F"):
        pictures.opened(tmp_path / "a.tiff", print)


def test_colours_of_a_printer_are_refused_by_name(tmp_path: Path) -> None:
    Image.new("CMYK", (4, 4)).save(tmp_path / "a.jpg")
    with pytest.raises(InvalidArgumentError, match=r"a\.jpg: expected grey or RGB, got CMYK"):
        pictures.read(tmp_path / "a.jpg", (3, 4, 4), resize=False)


@pytest.mark.parametrize("name", KEYED)
def test_a_transparent_colour_is_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, KEYED, name)
    with pytest.raises(InvalidArgumentError, match="expected no transparency"):
        pictures.read(path, (1, 2, 2), resize=False)


@pytest.mark.parametrize("suffix", ["jp2", "eps", "tga"])
def test_formats_that_pillow_cuts_or_runs_a_program_for_are_refused(
    tmp_path: Path, suffix: str
) -> None:
    # Of a JPEG 2000 file Pillow does not say how many bits it has cut.
    Image.new("RGB", (4, 4)).save(tmp_path / f"a.{suffix}")
    with pytest.raises(InvalidArgumentError, match="not a picture in one of BMP, GIF, JPEG, PNG"):
        pictures.read(tmp_path / f"a.{suffix}", (3, 4, 4), resize=False)


def test_a_plain_bitmap_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.pbm").write_bytes(b"P1 2 2\n1 0 1 0\n")
    read = pictures.read(tmp_path / "a.pbm", (1, 2, 2), resize=False)
    assert read.ravel().tolist() == [0, 255, 0, 255]
