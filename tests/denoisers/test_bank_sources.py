import gzip
import json
import os
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn
from numpy.typing import NDArray
from PIL import Image

from els_service.denoisers.bank_sources import CIFAR10_NAMES, read_source
from els_service.denoisers.banks import Bank
from els_service.errors import InvalidArgumentError, LoadError

GREY = np.arange(6 * 4 * 5, dtype=np.uint8).reshape(6, 4, 5)
COLOUR = np.arange(6 * 4 * 5 * 3, dtype=np.uint16).astype(np.uint8).reshape(6, 4, 5, 3)
LABELS = np.array([1, 0, 1, 2, 0, 1])
BY_LABEL = [1, 4, 0, 2, 5, 3]


def idx(array: NDArray[Any]) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


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


def save_picture(file: Path, pixels: NDArray[np.uint8]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


def assert_holds(bank: Bank, images: NDArray[Any], labels: NDArray[Any] | list[int]) -> None:
    """The bank's images are these, [N, H, W, C]."""
    assert bank.images.dtype == images.dtype
    np.testing.assert_array_equal(bank.images.transpose(0, 2, 3, 1), images)
    np.testing.assert_array_equal(bank.labels, labels)


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(LABELS))
    (path := tmp_path / "train-images-idx3-ubyte").write_bytes(idx(GREY))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, label in enumerate(LABELS):
        name = ("bag", "coat", "dress")[label]
        save_picture(tmp_path / "pictures" / name / f"{index}.png", COLOUR[index])
    return tmp_path / "pictures"


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    np.savez(path := tmp_path / "images.npz", images=GREY, labels=LABELS)
    return path


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    rows = np.random.default_rng(0).integers(0, 256, (10, 32 * 32, 3), np.uint8)
    for number in range(1, 6):
        save_picture(tmp_path / f"data_batch_{number}.png", rows[2 * number - 2 : 2 * number])
    (tmp_path / "train_lables.json").write_text(json.dumps([*range(8), 0, 0]))
    return tmp_path


class TestIdx:
    @pytest.mark.parametrize("zipped", ["images", "labels", "both", "neither"])
    def test_labels_are_found_beside_the_images(self, mnist: Path, zipped: str) -> None:
        labels = mnist.with_name("train-labels-idx1-ubyte")
        if zipped in ("labels", "both"):
            labels.with_name(labels.name + ".gz").write_bytes(gzip.compress(labels.read_bytes()))
            labels.unlink()
        if zipped in ("images", "both"):
            data = mnist.read_bytes()
            mnist.unlink()
            mnist = mnist.with_name(mnist.name + ".gz")
            mnist.write_bytes(gzip.compress(data))
        assert_holds(read_source(mnist), GREY[BY_LABEL][..., None], LABELS[BY_LABEL])

    def test_without_a_labels_file_the_bank_is_unlabelled(self, mnist: Path) -> None:
        mnist.with_name("train-labels-idx1-ubyte").unlink()
        assert_holds(read_source(mnist), GREY[..., None], [-1] * 6)
        assert read_source(mnist).file_names is None

    def test_labels_packed_as_the_images_go_first(self, mnist: Path) -> None:
        packed = mnist.with_name(f"{mnist.name}.gz")
        packed.write_bytes(gzip.compress(idx(GREY)))
        others = gzip.compress(idx(LABELS[::-1]))
        mnist.with_name("train-labels-idx1-ubyte.gz").write_bytes(others)
        assert read_source(mnist).fingerprint != read_source(packed).fingerprint
        assert_holds(read_source(mnist), GREY[BY_LABEL][..., None], sorted(LABELS))

    def test_a_given_labels_file_goes_before_the_one_beside(self, mnist: Path) -> None:
        (other := mnist.with_name("other")).write_bytes(idx(np.zeros(6)))
        assert_holds(read_source(mnist, labels=other), GREY[..., None], [0] * 6)

    def test_labels_for_other_images_are_refused(self, mnist: Path) -> None:
        (other := mnist.with_name("other")).write_bytes(idx(LABELS[:5]))
        with pytest.raises(LoadError, match=r"train-images.*: 6 images but 5 labels"):
            read_source(mnist, labels=other)

    def test_images_given_as_labels_are_refused(self, mnist: Path) -> None:
        with pytest.raises(LoadError, match=r"train-images.* not an IDX file .* with 1 dim"):
            read_source(mnist, labels=mnist)

    @given(cut=st.integers(1, len(idx(GREY))), zipped=st.booleans())
    def test_a_truncated_file_is_refused(
        self, cut: int, zipped: bool, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        data = idx(GREY)[:-cut]
        path = tmp_path_factory.mktemp("idx") / "cut-images-idx3-ubyte"
        path.write_bytes(gzip.compress(data) if zipped else data)
        with pytest.raises(LoadError, match="cut-images-idx3-ubyte"):
            read_source(path, format="idx")

    def test_a_file_that_goes_on_is_refused(self, mnist: Path) -> None:
        mnist.write_bytes(mnist.read_bytes() + b"\0")
        with pytest.raises(LoadError, match=r"expected 120 bytes .* got 121 bytes"):
            read_source(mnist)

    @given(cut=st.integers(1, len(gzip.compress(idx(GREY))) - 3))
    def test_a_truncated_gzip_stream_is_refused(
        self, cut: int, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        path = tmp_path_factory.mktemp("idx") / "images.gz"
        path.write_bytes(gzip.compress(idx(GREY))[:-cut])
        with pytest.raises(LoadError, match=r"images\.gz"):
            read_source(path)

    def test_a_damaged_gzip_stream_is_refused(self, tmp_path: Path) -> None:
        data = bytearray(gzip.compress(idx(GREY)))
        data[-5] ^= 1  # in the checksum
        (path := tmp_path / "images.gz").write_bytes(data)
        with pytest.raises(LoadError, match=r"images\.gz: cannot be read: CRC check failed"):
            read_source(path)

    @pytest.mark.parametrize("shape", [(0, 4, 5), (6, 0, 5)])
    def test_a_file_without_pixels_is_refused(
        self, tmp_path: Path, shape: tuple[int, int, int]
    ) -> None:
        (path := tmp_path / "images").write_bytes(idx(np.zeros(shape)))
        with pytest.raises(LoadError, match="images: holds no images"):
            read_source(path)


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
        told: list[LoadError] = []
        bank = read_source(folder, per_label=2, skipped=told.append)
        assert_holds(bank, COLOUR[[1, 4, 0, 2, 3]], [0, 0, 1, 1, 2])
        assert [Path(error.path).name for error in told] == ["0.png", "1.txt", "0.png"]
        assert_holds(
            read_source(folder, limit=3, skipped=told.append), COLOUR[[1, 4, 0]], [0, 0, 1]
        )
        save_picture(folder / "coat" / "0a.png", COLOUR[0, :3])
        with pytest.raises(LoadError, match=r"0a\.png: of size and channels"):
            read_source(folder, skipped=told.append)

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
        told: list[tuple[int, int]] = []
        read_source(folder, limit=4, progress=lambda *now: told.append(now))
        assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


class TestNpz:
    @given(
        images=stn.arrays(np.uint8, stn.array_shapes(min_dims=3, max_dims=4, max_side=4))
        | stn.arrays(np.float64, (3, 2, 2), elements=st.floats(-1, 1))
    )
    def test_uint8_stays_and_floats_become_float32(
        self, images: NDArray[Any], tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        path = tmp_path_factory.mktemp("npz") / "images.npz"
        np.savez(path, images=images)
        expected = images if images.dtype == np.uint8 else images.astype(np.float32)
        expected = expected if images.ndim == 4 else expected[..., None]
        assert_holds(read_source(path), expected, [-1] * len(images))

    def test_labels_are_kept(self, npz: Path) -> None:
        assert_holds(read_source(npz), GREY[BY_LABEL][..., None], LABELS[BY_LABEL])

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"pictures": GREY}, "expected an array 'images', got pictures"),
            ({"images": GREY.astype(np.int64)}, "expected uint8 or floats, got int64"),
            ({"images": GREY.astype(np.float32)}, "expected floats from -1 to 1"),
            ({"images": np.full((1, 2, 2), np.nan)}, "expected floats from -1 to 1"),
            ({"images": np.full((1, 2, 2), -1.01)}, "expected floats from -1 to 1"),
            ({"images": GREY[0]}, r"expected \[N, H, W\] or \[N, H, W, C\], got \(4, 5\)"),
            ({"images": np.zeros((2, 3, 8, 8), np.uint8)}, "expected channels last"),
            ({"images": np.zeros((0, 4, 5), np.uint8)}, "holds no images"),
            ({"images": np.array([[[None]]])}, "cannot be read: Object arrays"),
            ({"images": GREY, "labels": LABELS[:5]}, "6 images but 5 labels"),
            ({"images": GREY, "labels": LABELS - 1}, "expected integers from 0, got -1"),
            ({"images": GREY, "labels": LABELS / 2}, "expected one row of integers, got float64"),
            ({"images": GREY, "labels": LABELS > 0}, "expected one row of integers, got bool"),
            ({"images": GREY, "labels": LABELS[:, None]}, r"got int64 of shape \(6, 1\)"),
        ],
    )
    def test_other_arrays_are_refused(
        self, tmp_path: Path, arrays: dict[str, Any], message: str
    ) -> None:
        np.savez(path := tmp_path / "images.npz", allow_pickle=True, **arrays)
        with pytest.raises(LoadError, match=rf"images\.npz: .*{message}"):
            read_source(path)

    def test_a_damaged_file_is_refused(self, npz: Path) -> None:
        data = npz.read_bytes()
        for damaged in (data[: len(data) // 2], data.replace(b"NUMPY", b"NAMPY")):
            npz.write_bytes(damaged)
            with pytest.raises(LoadError, match=r"images\.npz: cannot be read"):
                read_source(npz)

    def test_a_pickle_is_not_loaded(self, npz: Path) -> None:
        npz.write_bytes(pickle.dumps(GREY))
        with pytest.raises(LoadError, match=r"images\.npz: cannot be read: .*pickle"):
            read_source(npz, format="npz")


class TestCifarPng:
    def test_every_row_of_every_strip_is_an_image(self, cifar: Path) -> None:
        bank = read_source(cifar)
        rows = [np.asarray(Image.open(cifar / f"data_batch_{n}.png")) for n in range(1, 6)]
        images = np.concatenate(rows).reshape(10, 32, 32, 3)
        assert_holds(bank, images[[0, 8, 9, *range(1, 8)]], [0, 0, *range(8)])
        assert bank.label_names == CIFAR10_NAMES[:8]

    @pytest.mark.parametrize("name", ["data_batch_3.png", "train_lables.json"])
    def test_a_missing_file_is_named(self, cifar: Path, name: str) -> None:
        (cifar / name).unlink()
        with pytest.raises(LoadError, match=f"{name}: cannot be read: No such file"):
            read_source(cifar)

    def test_a_strip_of_other_width_is_named(self, cifar: Path) -> None:
        save_picture(cifar / "data_batch_2.png", COLOUR[0])
        with pytest.raises(LoadError, match=r"data_batch_2\.png: expected RGB rows of 1024"):
            read_source(cifar)

    @pytest.mark.parametrize("labels", ["[0, 1", "{}", "[[0]]", "[1.5]", "[10]", "[-1]", '["a"]'])
    def test_odd_labels_are_refused(self, cifar: Path, labels: str) -> None:
        (cifar / "train_lables.json").write_text(labels)
        with pytest.raises(LoadError, match=r"train_lables\.json: "):
            read_source(cifar)


class TestDetection:
    def test_a_missing_source_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(LoadError, match="absent: cannot be read: No such file"):
            read_source(tmp_path / "absent")

    @pytest.mark.parametrize("data", [b"", b"GIF89a"])
    def test_an_unknown_format_is_refused(self, tmp_path: Path, data: bytes) -> None:
        (path := tmp_path / "thing").write_bytes(data)
        with pytest.raises(LoadError, match="thing: of no known format"):
            read_source(path)
