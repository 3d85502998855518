"""Folders of pictures as sources of banks."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tests.support.bank_sources import BY_LABEL, COLOUR, GREY, LABELS, assert_holds, save_picture

from els_service.denoisers.bank_sources import read_source
from els_service.errors import InvalidArgumentError, LoadError


def save_turned(file: Path, pixels: NDArray[np.uint8], orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(file, exif=exif)


def save_frames(file: Path) -> None:
    frames = [Image.fromarray(pixels) for pixels in COLOUR[:2]]
    frames[0].save(file, save_all=True, append_images=frames[1:])


def png_header(width: int, height: int) -> bytes:
    """A PNG without pixels: all that a decoder looks at before it takes memory."""
    chunks = (
        b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0),
        b"IDAT" + zlib.compress(b""),
    )
    written = (
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, label in enumerate(LABELS):
        name = ("bag", "coat", "dress")[label]
        save_picture(tmp_path / "pictures" / name / f"{index}.png", COLOUR[index])
    return tmp_path / "pictures"


class TestFolder:
    def test_sub_folders_are_labels_in_sorted_order(self, folder: Path) -> None:
        bank = read_source(folder)
        assert_holds(bank, COLOUR[BY_LABEL], LABELS[BY_LABEL])
        assert bank.label_names == ("bag", "coat", "dress")

    def test_each_image_keeps_the_name_of_its_file(self, folder: Path) -> None:
        names = read_source(folder, limit=4).file_names
        assert names is not None
        assert list(names) == ["bag/1.png", "bag/4.png", "coat/0.png", "coat/2.png"]

    def test_skipped_pictures_move_no_name(self, folder: Path) -> None:
        (folder / "bag" / "1.png").write_bytes(b"damaged")
        names = read_source(folder, skipped=lambda error: None).file_names
        assert names is not None
        assert list(names)[:2] == ["bag/4.png", "coat/0.png"]

    def test_a_flat_folder_is_unlabelled(self, tmp_path: Path) -> None:
        for index, pixels in enumerate(GREY):
            save_picture(tmp_path / f"{index}.png", pixels)
        assert_holds(read_source(tmp_path), GREY[..., None], [-1] * 6)

    def test_hidden_files_are_skipped(self, folder: Path) -> None:
        (folder / ".directory").write_text("settings")
        (folder / "bag" / ".thumbnails").mkdir()
        assert len(read_source(folder).images) == 6

    @pytest.mark.parametrize("name", ["bag/notes.txt", "notes.txt"])
    def test_a_file_that_is_no_picture_is_named(self, folder: Path, name: str) -> None:
        (folder / name).write_text("what I saw")
        with pytest.raises(LoadError, match=f"{name}: "):
            read_source(folder)

    def test_a_pipe_is_named_and_not_waited_for(self, folder: Path) -> None:
        os.mkfifo(pipe := folder / "bag" / "0.jpg")
        for source in (folder, pipe):
            with pytest.raises(LoadError, match="expected a file, got a pipe, socket or device"):
                read_source(source)
        skipped: list[LoadError] = []
        assert len(read_source(folder, skipped=skipped.append).images) == 6
        assert [error.path for error in skipped] == [str(pipe)]

    def test_a_nested_folder_is_named(self, folder: Path) -> None:
        (folder / "bag" / "red").mkdir()
        with pytest.raises(LoadError, match="bag/red: cannot be read: Is a directory"):
            read_source(folder)

    def test_an_empty_folder_or_label_is_named(self, folder: Path) -> None:
        (empty := folder / "apron").mkdir()
        for source in (folder, empty):
            with pytest.raises(LoadError, match="apron: holds no images"):
                read_source(source)

    def test_a_truncated_picture_is_named(self, folder: Path) -> None:
        file = folder / "coat" / "0.png"
        file.write_bytes(file.read_bytes()[:-30])
        with pytest.raises(LoadError, match=r"coat/0\.png: cannot be read"):
            read_source(folder)

    @pytest.mark.parametrize("other", [COLOUR[0, :3], GREY[0]], ids=["size", "mode"])
    def test_a_picture_of_other_size_or_mode_is_named(
        self, folder: Path, other: NDArray[np.uint8]
    ) -> None:
        save_picture(folder / "coat" / "other.png", other)
        with pytest.raises(LoadError, match=r"other\.png: .*\(4, 5, 3\)"):
            read_source(folder)

    def test_cropped_pictures_keep_their_proportions_as_the_client_s_do(
        self, tmp_path: Path
    ) -> None:
        wide = np.zeros((8, 16, 3), np.uint8)
        wide[:, 4:12] = 200
        Image.fromarray(wide).save(tmp_path / "wide.png")
        Image.fromarray(wide.transpose(1, 0, 2)).save(tmp_path / "high.png")
        # The filter reaches a little over the cut.
        assert read_source(tmp_path, resize=(4, 4), crop=True).images.min() > 150
        assert read_source(tmp_path, resize=(4, 4)).images.min() < 50
        with pytest.raises(InvalidArgumentError, match="crop: expected a size to resize to"):
            read_source(tmp_path, crop=True)

    def test_pictures_of_other_sizes_can_be_resized(self, folder: Path) -> None:
        save_picture(folder / "coat" / "other.png", COLOUR[0, :3])
        assert read_source(folder, resize=(8, 6)).images.shape == (7, 3, 8, 6)

    @pytest.mark.parametrize("mode", ["RGBA", "P", "1", "I;16"])
    def test_modes_without_a_plain_meaning_are_refused(self, tmp_path: Path, mode: str) -> None:
        Image.new(mode, (4, 5)).save(tmp_path / "odd.png")
        with pytest.raises(LoadError, match=rf"odd\.png: mode {mode}, expected L .* or RGB"):
            read_source(tmp_path)

    def test_formats_that_run_other_programs_are_not_read(self, tmp_path: Path) -> None:
        Image.new("L", (4, 5)).save(tmp_path / "page.eps")
        with pytest.raises(LoadError, match=r"page\.eps: .*cannot identify image"):
            read_source(tmp_path)

    def test_pictures_are_turned_as_their_exif_orientation_says(self, tmp_path: Path) -> None:
        for orientation in range(1, 9):
            save_turned(tmp_path / f"{orientation}.png", COLOUR[0], orientation)
        turned = COLOUR[0]
        views = [turned, turned[:, ::-1], turned[::-1, ::-1], turned[::-1]]
        assert_holds(read_source(tmp_path, limit=4), np.stack(views), [-1] * 4)
        for orientation in range(1, 5):
            (tmp_path / f"{orientation}.png").unlink()
        across = turned.transpose(1, 0, 2)
        views = [across, across[:, ::-1], across[::-1, ::-1], across[::-1]]
        assert_holds(read_source(tmp_path), np.stack(views), [-1] * 4)

    @pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
    def test_a_picture_of_several_frames_is_named(self, tmp_path: Path, suffix: str) -> None:
        save_frames(tmp_path / f"moves.{suffix}")
        with pytest.raises(LoadError, match=rf"moves\.{suffix}: expected one frame: .* got 2"):
            read_source(tmp_path)

    def test_of_the_pictures_that_a_camera_stores_in_one_file_the_first_is_taken(
        self, tmp_path: Path
    ) -> None:
        first, second = Image.new("RGB", (5, 4), (200, 0, 0)), Image.new("RGB", (5, 4))
        first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
        assert read_source(tmp_path).images[0, 0].min() > 150

    def test_a_colour_that_is_transparent_is_named_with_what_to_do(self, tmp_path: Path) -> None:
        Image.new("RGB", (5, 4)).save(tmp_path / "a.png", transparency=(0, 0, 0))
        with pytest.raises(LoadError, match=r"a\.png: expected no transparent colour.* flatten"):
            read_source(tmp_path)
        Image.new("RGBA", (5, 4)).save(tmp_path / "a.png")
        with pytest.raises(LoadError, match=r"a\.png: mode RGBA.* flatten it onto a background"):
            read_source(tmp_path)

    @pytest.mark.parametrize("side", [8200, 10_000, 20_000])
    def test_a_picture_that_announces_too_many_pixels_is_named_in_our_words(
        self, tmp_path: Path, side: int
    ) -> None:
        (tmp_path / "wide.png").write_bytes(png_header(side, side))
        with pytest.raises(LoadError, match=r"wide\.png: expected at most 67108864 pixels, got"):
            read_source(tmp_path)

    def test_unreadable_pictures_are_left_out_and_told_and_others_take_their_place(
        self, folder: Path
    ) -> None:
        (folder / "bag" / "0.png").write_bytes(b"no picture")
        (folder / "coat" / "1.txt").write_text("notes")
        save_frames(folder / "dress" / "0.png")
        errors: list[LoadError] = []
        bank = read_source(folder, per_label=2, skipped=errors.append)
        assert_holds(bank, COLOUR[[1, 4, 0, 2, 3]], [0, 0, 1, 1, 2])
        assert [Path(error.path).name for error in errors] == ["0.png", "1.txt", "0.png"]
        assert_holds(
            read_source(folder, limit=3, skipped=errors.append), COLOUR[[1, 4, 0]], [0, 0, 1]
        )
        save_picture(folder / "coat" / "0a.png", COLOUR[0, :3])
        with pytest.raises(LoadError, match=r"0a\.png: of size and channels"):
            read_source(folder, skipped=errors.append)

    def test_a_folder_without_a_readable_picture_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(b"")
        with pytest.raises(LoadError, match="holds no images that can be read"):
            read_source(tmp_path, skipped=lambda _: None)

    def test_a_wide_picture_among_others_is_named_before_the_rest_is_decoded(
        self, tmp_path: Path
    ) -> None:
        for index, pixels in enumerate((COLOUR[0], COLOUR[0, :3])):
            save_picture(tmp_path / f"{index}.png", pixels)
        (tmp_path / "2.png").write_bytes(b"never looked at")
        with pytest.raises(LoadError, match=r"1\.png: of size"):
            read_source(tmp_path)

    def test_progress_counts_up_to_what_is_taken(self, folder: Path) -> None:
        calls: list[tuple[int, int]] = []
        read_source(folder, limit=4, progress=lambda *now: calls.append(now))
        assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
