"""Banks of images of several sizes, and their files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save as encode_safetensors

from els_service.denoisers.banks import Bank, load_bank, make_bank, save_bank
from els_service.denoisers.mixed_banks import MixedBank, load_any_bank, make_mixed_bank
from els_service.denoisers.originality import distances_to
from els_service.errors import InvalidArgumentError, LoadError
from els_service.experiments.training import load_training_data

SIZES = [(2, 3), (4, 1), (2, 3), (1, 5)]
NAMES = ["wide.png", "tall.png", "a/wide.png", "row.png"]


def pictures(channels: int = 2, sizes: list[tuple[int, int]] = SIZES) -> list[NDArray[np.uint8]]:
    random = np.random.default_rng(len(sizes))
    return [random.integers(0, 256, (channels, *size), np.uint8) for size in sizes]


def mixed(**options: Any) -> MixedBank:
    common: dict[str, Any] = {"labels": [1, 0, 1, 1], "file_names": NAMES, "licence": "CC0"}
    bank = make_mixed_bank(pictures(), **{**common, **options})
    assert isinstance(bank, MixedBank)
    return bank


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_bank(mixed(label_names=("x", "y")), path := tmp_path / "mixed.safetensors")
    return path


def test_images_are_sorted_by_label_and_size_with_their_names() -> None:
    bank, given_ = mixed(), pictures()
    assert bank.labels.tolist() == [0, 1, 1, 1]
    assert bank.extents.tolist() == [[4, 1], [1, 5], [2, 3], [2, 3]]
    assert bank.file_names is not None
    assert list(bank.file_names) == ["tall.png", "row.png", "wide.png", "a/wide.png"]
    for index, was in enumerate([1, 3, 0, 2]):
        want = given_[was].astype(np.float64) / 127.5 - 1
        np.testing.assert_allclose(bank.image(index), want, rtol=0, atol=2**-24)
        assert bank.image(index).dtype == np.float32
    np.testing.assert_array_equal(bank.image(-1), bank.image(3))
    with pytest.raises(IndexError):
        bank.image(4)
    assert (bank.label_count, bank.label_range(1), len(bank)) == (2, (1, 4), 4)


def test_groups_are_views_of_the_images_of_one_size_in_a_row() -> None:
    bank = mixed()
    assert [group.shape for group in bank.groups] == [(1, 2, 4, 1), (1, 2, 1, 5), (2, 2, 2, 3)]
    assert all(np.shares_memory(group, bank.images) for group in bank.groups)
    assert (bank.size, bank.channels, bank.sides) == (42, 2, ((1, 4), (1, 5)))


def test_distances_are_to_the_images_of_the_size_of_the_image() -> None:
    bank = mixed()
    same, every, _ = distances_to(bank.image(3), bank)
    assert same.tolist() == [2, 3]
    assert every[1] == 0
    assert every[0] == pytest.approx(np.linalg.norm(bank.image(2) - bank.image(3)))
    assert not len(distances_to(bank.image(3)[:1], bank)[0])


def test_its_shape_is_the_most_frequent_size_and_of_equally_frequent_ones_the_largest() -> None:
    assert mixed().shape == (2, 2, 3)
    other = make_mixed_bank(pictures(1, [(2, 3), (4, 1), (5, 3), (1, 5)]))
    assert other.shape == (1, 5, 3)


def test_images_of_one_size_make_a_bank_as_ever() -> None:
    images = pictures(sizes=[(2, 3)] * 3)
    bank = make_mixed_bank(images, [1, 0, 0], source="here")
    assert isinstance(bank, Bank)
    assert bank.fingerprint == make_bank(np.stack(images), [1, 0, 0]).fingerprint
    assert bank.extents.tolist() == [[2, 3]] * 3
    np.testing.assert_array_equal(bank.image(0), bank.pixels()[0])
    assert [group.shape for group in bank.groups] == [(3, 2, 2, 3)]


@st.composite
def banks(draw: st.DrawFn) -> MixedBank:
    sides = st.integers(1, 4)
    sizes = draw(st.lists(st.tuples(sides, sides), min_size=2, max_size=5).filter(_differ))
    images = pictures(draw(st.integers(1, 3)), sizes)
    given_: list[NDArray[Any]] = list(images)
    if draw(st.booleans()):
        given_ = [image.astype(np.float32) / 255 for image in images]
    labels = draw(st.none() | st.lists(st.integers(0, 2), min_size=len(sizes), max_size=len(sizes)))
    names = draw(st.none() | st.just([f"{i}.png" for i in range(len(sizes))]))
    bank = make_mixed_bank(
        given_, labels, source=draw(st.sampled_from(["", "é"])), file_names=names
    )
    assert isinstance(bank, MixedBank)
    return bank


def _differ(sizes: list[tuple[int, int]]) -> bool:
    return len(set(sizes)) > 1


@settings(max_examples=25)
@given(bank=banks())
def test_a_bank_comes_back_from_its_file_as_it_was(
    bank: MixedBank, tmp_path_factory: pytest.TempPathFactory
) -> None:
    save_bank(bank, path := tmp_path_factory.mktemp("banks") / "bank.safetensors")
    got = load_any_bank(path)
    assert isinstance(got, MixedBank)
    for name in ("images", "extents", "labels"):
        assert getattr(got, name).dtype == getattr(bank, name).dtype
        np.testing.assert_array_equal(getattr(got, name), getattr(bank, name))
    for name in ("fingerprint", "source", "label_names", "shape"):
        assert getattr(got, name) == getattr(bank, name)
    assert (got.file_names is None) == (bank.file_names is None)
    save_bank(got, again := path.with_name("again.safetensors"))
    assert again.read_bytes() == path.read_bytes()


def test_the_fingerprint_covers_sizes_and_contents_but_not_provenance() -> None:
    flat = [image.reshape(2, *size) for image, size in zip(pictures(), SIZES, strict=True)]
    turned = [image.transpose(0, 2, 1).reshape(2, *image.shape[:0:-1]) for image in flat]
    same_numbers = [image.reshape(2, *image.shape[:0:-1]) for image in flat]
    fingerprints = {
        make_mixed_bank(flat).fingerprint,
        make_mixed_bank(turned).fingerprint,
        make_mixed_bank(same_numbers).fingerprint,
        make_mixed_bank(flat, [0, 0, 0, 0]).fingerprint,
        make_mixed_bank([image.astype(np.float32) / 255 for image in flat]).fingerprint,
    }
    assert len(fingerprints) == 5
    bank = mixed()
    assert dataclasses.replace(bank, source="there").fingerprint == bank.fingerprint
    assert mixed(file_names=None).fingerprint == bank.fingerprint


REFUSED: list[tuple[list[Any], str]] = [
    ([], "images: expected at least one, got none"),
    ([np.zeros((1, 2), np.uint8)], r"images: expected shape \[C, H, W\], none of them 0"),
    ([np.zeros((1, 0, 2), np.uint8)], r"images: expected shape \[C, H, W\], none of them 0"),
    (
        [np.zeros((1, 2, 3), np.uint8), np.zeros((3, 2, 2), np.uint8)],
        "images: expected one type and number of channels, got uint8 of 1 channels, uint8 of 3",
    ),
    (
        [np.zeros((1, 2, 3), np.uint8), np.zeros((1, 2, 2), np.float32)],
        "images: expected one type and number of channels, got float32 of 1 channels, uint8",
    ),
    (
        [np.zeros((1, 2, 3), np.float32), np.full((1, 2, 2), np.nan, np.float32)],
        "images: expected float values from -1 to 1, got nan",
    ),
    ([np.zeros((1, 2, 3)), np.zeros((1, 2, 2))], "images: expected uint8 or float32, got float64"),
]


@pytest.mark.parametrize(("images", "message"), REFUSED)
def test_images_that_make_no_bank_are_refused(images: list[Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        make_mixed_bank(images)


def test_labels_and_names_are_checked_as_those_of_any_bank() -> None:
    for options, message in (
        ({"labels": [0, 0]}, r"labels: expected shape \(4,\)"),
        ({"labels": [-1, 0, 0, 0]}, "labels: expected all -1, or all at least 0"),
        ({"label_names": ("x",)}, "label_names: expected none or 2"),
        ({"source": "\x1b"}, "source: expected printable text"),
        ({"file_names": ["x"]}, "file_names: expected one for each of 4 images, got 1"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            mixed(**options)


HUGE = 2**40
EXTENTS: dict[str, NDArray[Any]] = {
    r"extents: expected int64 of shape \[N, 2\], got int32": np.ones((4, 2), np.int32),
    r"extents: .* got int64 of shape \(4, 3\)": np.ones((4, 3), np.int64),
    r"extents: .* got int64 of shape \(4,\)": np.ones(4, np.int64),
    "extents: expected two sizes or more, got fewer": np.ones((4, 2), np.int64),
    "extents: expected sides from 1, .*got sides from 0 to 4": np.array([[0, 4]] + 3 * [[2, 3]]),
    "extents: expected sides from 1, .* of at most 42 numbers": np.array([[9, 4]] + 3 * [[2, 4]]),
    "extents: .* got sides from 1 to 1099511627776": np.array([[HUGE, HUGE]] + 3 * [[1, 1]]),
    "images: expected a multiple of the 25 pixels": np.array([[7, 1]] + 3 * [[2, 3]]),
    r"labels: expected int64 of shape \(3,\)": np.array([[7, 1]] + 2 * [[2, 3]]),
}


def forge(tensors: dict[str, NDArray[Any]], metadata: dict[str, str]) -> bytes:
    """Return a file as another program would write it, parts of it replaced."""
    bank = mixed(label_names=("x", "y"), file_names=None)
    honest = {
        "format": "els-bank",
        "version": "3",
        "fingerprint": bank.fingerprint,
        "source": bank.source,
        "licence": bank.licence,
        "label_names": json.dumps(bank.label_names),
    }
    own = {"images": bank.images, "extents": bank.extents, "labels": bank.labels}
    return encode_safetensors({**own, **tensors}, {**honest, **metadata})


@pytest.mark.parametrize("message", EXTENTS)
def test_a_file_whose_extents_do_not_fit_is_refused_by_the_name_of_the_tensor(
    file: Path, message: str
) -> None:
    file.write_bytes(forge({"extents": EXTENTS[message]}, {}))
    with pytest.raises(LoadError, match=rf"mixed\.safetensors: not a bank: {message}"):
        load_any_bank(file)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({}, {"version": "1"}, "version: expected els-bank version 3, got els-bank version 1"),
        ({"images": np.zeros((1, 42), np.uint8)}, {}, r"images: expected shape \[M\]"),
        ({"images": np.zeros(42, np.int16)}, {}, "images: expected uint8 or float32"),
        ({"images": np.zeros(42, np.uint8)}, {}, "fingerprint: expected [0-9a-f]{64}"),
        ({"labels": np.zeros(4)}, {}, r"labels: expected int64 of shape \(4,\)"),
        ({}, {}, "checksum: .*not byte for byte what save_bank writes"),
        ({"more": np.zeros(3)}, {}, "checksum: .*not byte for byte what save_bank writes"),
        ({"file_names": np.zeros(3, np.uint8)}, {}, "file_names: expected a line feed"),
    ],
)
def test_a_file_that_holds_no_valid_bank_is_refused(
    file: Path, tensors: dict[str, NDArray[Any]], metadata: dict[str, str], message: str
) -> None:
    file.write_bytes(forge(tensors, metadata))
    with pytest.raises(LoadError, match=rf"mixed\.safetensors: not a bank: {message}"):
        load_any_bank(file)


@pytest.mark.slow
def test_a_file_of_any_other_length_is_refused(file: Path) -> None:
    data = file.read_bytes()
    for changed in (*(data[:length] for length in range(0, len(data), 3)), data + b"\0"):
        file.write_bytes(changed)
        with pytest.raises(LoadError, match=r"mixed\.safetensors: not a bank: [\w' ]+"):
            load_any_bank(file)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.slow
def test_an_altered_file_is_always_refused_with_the_name_of_a_field(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("altered") / "mixed.safetensors"
    save_bank(mixed(), path)
    good = path.read_bytes()
    begin = data.draw(st.integers(0, len(good) - 1))
    removed = data.draw(st.integers(0, 40))
    inserted = data.draw(st.binary(max_size=40))
    altered = good[:begin] + inserted + good[begin + removed :]
    path.write_bytes(altered)
    if altered == good:
        load_any_bank(path)
        return
    with pytest.raises(LoadError, match=r"mixed\.safetensors: not a bank: ('?[a-z_A-Z0-9]+'?)"):
        load_any_bank(path)


def test_where_images_of_one_size_are_needed_a_mixed_bank_is_refused_by_name(file: Path) -> None:
    expected = "extents: expected images of one size, got several sizes"
    with pytest.raises(LoadError, match=rf"mixed\.safetensors: {expected}"):
        load_bank(file)
    expected = "bank: expected images of one size for training, got heights from 1 to 4"
    with pytest.raises(InvalidArgumentError, match=expected):
        load_training_data([file])
