from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from els_service.denoisers.bank_sources import read_source
from els_service.denoisers.banks import Bank
from els_service.errors import InvalidArgumentError

GREY = np.arange(6 * 4 * 5, dtype=np.uint8).reshape(6, 4, 5)


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    np.savez(path := tmp_path / "images.npz", images=GREY, labels=[1, 0, 1, 2, 0, 1])
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, name in enumerate(("bag", "bag", "coat", "coat", "coat", "dress")):
        (tmp_path / "pictures" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(GREY[index]).save(tmp_path / "pictures" / name / f"{index}.png")
    return tmp_path / "pictures"


def assert_holds(bank: Bank, images: NDArray[np.uint8], labels: list[int]) -> None:
    """The bank's images are these grey ones, [N, H, W]."""
    assert bank.images.dtype == np.uint8
    np.testing.assert_array_equal(bank.images[:, 0], images)
    np.testing.assert_array_equal(bank.labels, labels)


def test_limit_takes_the_first_images(npz: Path) -> None:
    assert_holds(read_source(npz, limit=2), GREY[[1, 0]], [0, 1])


def test_per_label_takes_the_first_of_each_label(npz: Path) -> None:
    bank = read_source(npz, per_label=2)
    assert_holds(bank, GREY[[1, 4, 0, 2, 3]], [0, 0, 1, 1, 2])


def test_limit_counts_what_per_label_leaves(npz: Path) -> None:
    assert_holds(read_source(npz, per_label=1, limit=2), GREY[[1, 0]], [0, 1])


def test_given_names_go_before_those_of_the_source(folder: Path) -> None:
    assert read_source(folder, label_names=("x", "y", "z")).label_names == ("x", "y", "z")


def test_names_past_the_largest_label_taken_are_dropped(folder: Path) -> None:
    assert read_source(folder, limit=3).label_names == ("bag", "coat")


def test_only_what_is_taken_is_decoded(folder: Path) -> None:
    (folder / "dress" / "5.png").write_bytes(b"")
    assert len(read_source(folder, limit=5).images) == 5


def test_resizing_is_bilinear_and_keeps_uint8(npz: Path) -> None:
    bank = read_source(npz, limit=1, resize=(8, 10))
    size, bilinear = (10, 8), Image.Resampling.BILINEAR
    expected = np.asarray(Image.fromarray(GREY[0]).resize(size, bilinear))
    assert_holds(bank, expected[None], [1])


def test_resized_floats_stay_in_range(tmp_path: Path) -> None:
    signs = np.where(np.random.default_rng(0).random((4, 5, 7, 3)) < 0.5, -1.0, 1.0)
    np.savez(path := tmp_path / "images.npz", images=signs)
    pixels = read_source(path, resize=(13, 3)).pixels()
    assert pixels.shape == (4, 3, 13, 3)
    assert pixels.abs().max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit: expected at least 1, got 0"),
        ({"per_label": -1}, "per_label: expected at least 1, got -1"),
        ({"resize": (0, 4)}, "resize: expected sides from 1 to 4096"),
        ({"format": "zip"}, "format: expected auto, idx, folder, npz, cifar-png, tar, .*, got zip"),
        ({"labels": "beside"}, "labels: expected none for a source of format npz"),
        ({"label_names": ("a", "b")}, "label_names: expected 3 names, got 2"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    npz: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        read_source(npz, **options)


@pytest.mark.parametrize("options", [{"per_label": 1}, {"label_names": ("a",)}])
def test_an_unlabelled_source_takes_no_label_options(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    np.savez(path := tmp_path / "images.npz", images=GREY)
    with pytest.raises(InvalidArgumentError, match="unlabelled"):
        read_source(path, **options)
