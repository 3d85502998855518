import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn
from numpy.typing import NDArray
from PIL import Image
from tests.support.bank_sources import (
    BY_LABEL,
    COLOUR,
    GREY,
    LABELS,
    assert_holds,
    idx,
    save_picture,
)

from els_service.denoisers.bank_sources import CIFAR10_NAMES, read_source
from els_service.errors import LoadError


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(LABELS))
    (path := tmp_path / "train-images-idx3-ubyte").write_bytes(idx(GREY))
    return path


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
