import dataclasses
import json
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn
from numpy.typing import ArrayLike, NDArray
from safetensors.numpy import save as encode_safetensors
from safetensors.torch import save as encode_torch_safetensors

import els_service
from els_service.denoisers.banks import Bank, load_bank, make_bank, save_bank
from els_service.denoisers.file_names import FileNames, printable_name
from els_service.errors import InvalidArgumentError, LoadError

BUNDLED = Path(els_service.__file__).parent / "bundled/_banks/fashion-mnist-5000.safetensors"
PIXELS = np.arange(4 * 2 * 3, dtype=np.uint8).reshape(4, 1, 2, 3)
FLOATS = np.zeros((4, 1, 2, 3), np.float32)
TEXT = st.text(st.characters(exclude_categories=("C", "Z")))


@pytest.fixture
def bank() -> Bank:
    return make_bank(
        PIXELS, [2, 0, 2, 0], label_names=("cat", "dog", "é"), source="here", licence="MIT"
    )


@pytest.fixture
def file(tmp_path: Path, bank: Bank) -> Path:
    save_bank(bank, path := tmp_path / "bank.safetensors")
    return path


@st.composite
def banks(draw: st.DrawFn) -> Bank:
    shape = draw(stn.array_shapes(min_dims=4, max_dims=4, max_side=4))
    floats = st.floats(-1, 1, width=32)
    images: NDArray[Any] = draw(
        stn.arrays(np.uint8, shape) | stn.arrays(np.float32, shape, elements=floats)
    )
    files = draw(st.none() | st.lists(TEXT, min_size=shape[0], max_size=shape[0]))
    if draw(st.booleans()):
        return make_bank(images, source=draw(TEXT), licence=draw(TEXT), file_names=files)
    labels = draw(stn.arrays(np.int64, shape[0], elements=st.integers(0, 5)))
    count = int(labels.max()) + 1
    names = draw(st.just([]) | st.lists(TEXT, min_size=count, max_size=count))
    return make_bank(images, labels, label_names=tuple(names), source=draw(TEXT), file_names=files)


def assert_same(got: Bank, expected: Bank) -> None:
    assert got.images.dtype == expected.images.dtype
    np.testing.assert_array_equal(got.images, expected.images)
    np.testing.assert_array_equal(got.labels, expected.labels)
    for name in ("label_names", "source", "licence", "fingerprint", "shape", "label_count"):
        assert getattr(got, name) == getattr(expected, name)
    assert names_of(got) == names_of(expected)


def names_of(bank: Bank) -> list[str] | None:
    return None if bank.file_names is None else list(bank.file_names)


@given(bank=banks())
@pytest.mark.slow
def test_a_bank_comes_back_from_its_file_as_it_was(
    bank: Bank, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("banks") / "bank.safetensors"
    save_bank(bank, path)
    assert_same(load_bank(path), bank)


def test_images_are_sorted_by_label_and_equal_labels_keep_their_order(bank: Bank) -> None:
    np.testing.assert_array_equal(bank.labels, [0, 0, 2, 2])
    np.testing.assert_array_equal(bank.images, PIXELS[[1, 3, 0, 2]])
    assert bank.images.flags.c_contiguous


def test_file_names_are_sorted_with_their_images_and_change_no_fingerprint(
    bank: Bank, file: Path
) -> None:
    named = make_bank(
        PIXELS,
        [2, 0, 2, 0],
        label_names=bank.label_names,
        source="here",
        licence="MIT",
        file_names=["a.png", "b/ä.png", "c.png", ""],
    )
    assert names_of(named) == ["b/ä.png", "", "a.png", "c.png"]
    assert named.fingerprint == bank.fingerprint
    without = file.read_bytes()
    save_bank(named, file)
    assert_same(load_bank(file), named)
    # A bank without names has the bytes that it always had: older servers load it.
    assert b'"version":"1"' in without
    assert b'"version":"2"' in file.read_bytes()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b", "c"], "file_names: expected one for each of 4 images, got 3"),
        (["a", "b", "c", "d\x1b[2J"], "file_names: expected printable text"),
        (["a", "b", "c", "d\ne"], "file_names: expected printable text"),
        (["a", "b", "c", "d" * 256], "file_names: expected at most 255 bytes each, got 256 bytes"),
    ],
)
def test_file_names_that_do_not_fit_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message.replace("[", "\\[")):
        make_bank(PIXELS, file_names=names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "a line feed after each name, got none"),
        (b"a\nb", "a line feed after each name, got none"),
        (b"\xff\n", "UTF-8, got other bytes"),
    ],
)
def test_a_text_that_holds_no_file_names_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"file_names: expected {message}"):
        FileNames(np.frombuffer(text, np.uint8))
    floats: Any = np.zeros(4)
    with pytest.raises(InvalidArgumentError, match="file_names: expected uint8"):
        FileNames(floats)


def test_file_names_are_read_one_by_one() -> None:
    names = FileNames.of(["a.png", "", "ß"])
    assert [names[i] for i in range(3)] == ["a.png", "", "ß"]
    assert (len(names), names.longest, names.nbytes) == (3, 5, 10 + 3 * 8)
    for index in (-1, 3):
        with pytest.raises(IndexError, match="expected 0 to 2"):
            names[index]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("cats/one.png", "cats/one.png"),
        ("cats/one\u200b.png", "cats/one?.png"),
        ("cats/\udcff.png", "cats/?.png"),
        (f"{'c' * 200}/{'d' * 100}", "d" * 100),
        ("ä" * 200, "…" + "ä" * 126),
    ],
)
def test_a_file_has_a_printable_name_of_at_most_255_bytes(file: str, name: str) -> None:
    assert printable_name(Path("bank") / file, Path("bank")) == name
    assert list(FileNames.of([name])) == [name]


def test_shape_and_label_count_describe_the_bank(bank: Bank) -> None:
    assert (bank.shape, bank.label_count) == ((1, 2, 3), 3)
    assert make_bank(PIXELS).label_count == 0


def test_label_ranges_are_half_open_and_minus_one_means_all(bank: Bank) -> None:
    assert [bank.label_range(label) for label in (-1, 0, 2)] == [(0, 4), (0, 2), (2, 4)]
    assert make_bank(PIXELS).label_range(-1) == (0, 4)


@pytest.mark.parametrize("label", [-2, 1, 3])
def test_a_label_without_images_is_refused(bank: Bank, label: int) -> None:
    with pytest.raises(InvalidArgumentError, match=f"label: .* got {label}"):
        bank.label_range(label)


def test_a_label_is_refused_by_an_unlabelled_bank() -> None:
    with pytest.raises(InvalidArgumentError, match="unlabelled"):
        make_bank(PIXELS).label_range(0)


def test_every_byte_value_maps_to_its_pixel() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    pixels = make_bank(values).pixels()
    assert pixels.dtype == torch.float32
    expected = values.astype(np.float64) / 127.5 - 1
    np.testing.assert_allclose(pixels.numpy(), expected, rtol=0, atol=2**-24)
    assert (pixels.min().item(), pixels.max().item()) == (-1, 1)


def test_pixels_of_a_float_bank_are_a_copy() -> None:
    bank = make_bank(FLOATS)
    bank.pixels().fill_(1)
    assert not bank.images.any()


def test_the_fingerprint_tells_contents_and_names_apart_but_not_provenance(bank: Bank) -> None:
    others = [
        make_bank(bank.images, bank.labels),
        make_bank(bank.images, [0, 0, 1, 2], label_names=bank.label_names),
        make_bank(bank.images[::-1], bank.labels, label_names=bank.label_names),
        make_bank(bank.images.reshape(4, 1, 3, 2), bank.labels, label_names=bank.label_names),
        make_bank(bank.images.astype(np.float32) / 255, bank.labels, label_names=bank.label_names),
    ]
    assert len({bank.fingerprint, *(other.fingerprint for other in others)}) == 6
    assert dataclasses.replace(bank, source="there").fingerprint == bank.fingerprint


REFUSED_ARGUMENTS: dict[str, tuple[ArrayLike, ArrayLike | None, tuple[str, ...]]] = {
    "images: expected uint8 or float32, got float64": (FLOATS.astype(np.float64), None, ()),
    "images: expected uint8 or float32, got bool": (PIXELS > 0, None, ()),
    r"images: expected shape \[N, C, H, W\].*got \(4, 2, 3\)": (PIXELS[:, 0], None, ()),
    r"images: expected shape \[N, C, H, W\].*got \(0, 1, 2, 3\)": (PIXELS[:0], None, ()),
    "images: expected float values from -1 to 1, got nan": (FLOATS * np.nan, None, ()),
    "images: expected float values from -1 to 1, got 1.5 to 1.5": (FLOATS + 1.5, None, ()),
    "images: expected float values from -1 to 1, got -2.0 to -2.0": (FLOATS - 2, None, ()),
    "labels: expected integers that fit int64, got float64": (PIXELS, [0.0, 1, 2, 3], ()),
    "labels: expected integers that fit int64, got uint64": (PIXELS, np.zeros(4, np.uint64), ()),
    "labels: expected integers that fit int64, got bool": (PIXELS, np.zeros(4, bool), ()),
    r"labels: expected shape \(4,\), got \(3,\)": (PIXELS, [0, 1, 2], ()),
    r"labels: expected shape \(4,\), got \(4, 1\)": (PIXELS, [[0], [1], [2], [3]], ()),
    "labels: expected all -1, or all at least 0, got -1": (PIXELS, [-1, 0, 0, 0], ()),
    "labels: expected all -1, or all at least 0, got -2": (PIXELS, [-2, -2, -2, -2], ()),
    "label_names: expected none or 2": (PIXELS, [0, 1, 0, 1], ("cat",)),
    "label_names: expected none or 0": (PIXELS, None, ("cat",)),
    "label_names: expected printable text": (PIXELS, [0, 0, 0, 0], ("\x1b[2J",)),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED_ARGUMENTS)
def test_an_argument_that_is_no_bank_is_refused(message: str) -> None:
    images, labels, names = REFUSED_ARGUMENTS[message]
    with pytest.raises(InvalidArgumentError, match=message):
        make_bank(images, labels, label_names=names)


def test_the_same_bank_gives_the_same_bytes(file: Path, bank: Bank) -> None:
    first = file.read_bytes()
    save_bank(load_bank(file), file)
    assert file.read_bytes() == first


@pytest.mark.slow
@pytest.mark.parametrize("named", [False, True], ids=["without names", "with names"])
def test_a_file_with_any_byte_changed_is_refused(file: Path, named: bool) -> None:
    if named:
        save_bank(make_bank(PIXELS, file_names=["a", "bc", "d", "e"]), file)
    data = file.read_bytes()
    for position in range(len(data)):
        # 0x29 turns the header's padding into tabs, which is still JSON; 0x20 turns case.
        for mask in (0x01, 0x20, 0x29, 0xFF):
            flipped = bytearray(data)
            flipped[position] ^= mask
            file.write_bytes(flipped)
            with pytest.raises(LoadError, match=r"bank\.safetensors: not a bank: "):
                load_bank(file)


@pytest.mark.slow
def test_a_file_of_any_other_length_is_refused(file: Path) -> None:
    data = file.read_bytes()
    for changed in (*(data[:length] for length in range(len(data))), data + b"\0"):
        file.write_bytes(changed)
        with pytest.raises(LoadError, match=r"bank\.safetensors: "):
            load_bank(file)


def test_a_bank_loads_whatever_the_low_byte_of_its_header_length_is(tmp_path: Path) -> None:
    path, seen = tmp_path / "bank.safetensors", set()
    for size in range(8, 264, 8):
        save_bank(made := make_bank(PIXELS, source="x" * size), path)
        assert_same(load_bank(path), made)
        seen.add(path.read_bytes()[0])
    assert seen == set(range(0, 256, 8))


@pytest.mark.parametrize("data", [b"", b"no bank at all", pickle.dumps(PIXELS), b"\xff" * 100])
def test_a_file_that_is_not_safetensors_is_refused(tmp_path: Path, data: bytes) -> None:
    (path := tmp_path / "other.safetensors").write_bytes(data)
    with pytest.raises(LoadError, match=r"other\.safetensors: not a bank"):
        load_bank(path)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"absent\.safetensors: No such file"):
        load_bank(tmp_path / "absent.safetensors")


def forge(bank: Bank, tensors: dict[str, NDArray[Any]], metadata: dict[str, str]) -> bytes:
    """A file as another program would write it, parts of it replaced."""
    honest = {
        "format": "els-bank",
        "version": "1",
        "fingerprint": bank.fingerprint,
        "source": bank.source,
        "licence": bank.licence,
        "label_names": json.dumps(bank.label_names),
    }
    return encode_safetensors(
        {"images": bank.images, "labels": bank.labels} | tensors, honest | metadata
    )


FORGERIES: dict[str, tuple[dict[str, NDArray[Any]], dict[str, str]]] = {
    "expected els-bank version 1, got els-bank version 2": ({}, {"version": "2"}),
    "expected els-bank version 2, got els-bank version 1": ({"file_names": PIXELS.ravel()}, {}),
    "expected els-bank version 1, got pictures version 1": ({}, {"format": "pictures"}),
    "images: expected uint8 or float32, got int16": ({"images": PIXELS.astype(np.int16)}, {}),
    r"images: expected shape \[N, C, H, W\]": ({"images": PIXELS[:, 0]}, {}),
    "images: expected float values from -1 to 1, got nan": ({"images": FLOATS * np.nan}, {}),
    "images: expected float values from -1 to 1, got inf": ({"images": FLOATS + np.inf}, {}),
    "images: expected float values from -1 to 1, got 2.0": ({"images": FLOATS + 2}, {}),
    "labels: expected labels in increasing order": ({"labels": np.array([0, 2, 0, 2])}, {}),
    r"labels: expected int64 of shape \(4,\), got int32": ({"labels": np.zeros(4, np.int32)}, {}),
    r"labels: .* \(4,\), got int64 of shape \(3,\)": ({"labels": np.arange(3)}, {}),
    "labels: expected all -1": ({"labels": np.array([-1, 0, 1, 2])}, {}),
    "label_names: expected none or 3": ({}, {"label_names": '["cat"]'}),
    "label_names: expected printable text": ({}, {"label_names": "[1, 2, 3]"}),
    "label_names: expected a list in JSON, .*not iterable": ({}, {"label_names": "3"}),
    "label_names: expected a list in JSON, got Expecting": ({}, {"label_names": "cat, dog"}),
    "label_names: .*maximum recursion depth": ({}, {"label_names": "[" * 100_000}),
    "source: expected printable text": ({}, {"source": "\x1b[2J"}),
    "the fingerprint does not match the contents": ({}, {"fingerprint": "0" * 64}),
    "the fingerprint does not match": ({"images": PIXELS}, {}),
    "damaged or edited": ({}, {"source": "elsewhere"}),
    "not byte for byte what save_bank writes": ({"more": PIXELS}, {}),
}  # fmt: skip


@pytest.mark.parametrize("message", FORGERIES)
def test_a_safetensors_file_that_holds_no_valid_bank_is_refused(
    file: Path, bank: Bank, message: str
) -> None:
    file.write_bytes(forge(bank, *FORGERIES[message]))
    with pytest.raises(LoadError, match=rf"bank\.safetensors: .*{message}"):
        load_bank(file)


@pytest.mark.parametrize("key", ["format", "version", "fingerprint", "source", "label_names"])
def test_missing_metadata_is_named(file: Path, key: str) -> None:
    # Same length, so that nothing but the key is gone.
    file.write_bytes(file.read_bytes().replace(f'"{key}"'.encode(), f'"_{key[1:]}"'.encode()))
    with pytest.raises(LoadError, match=f"'{key}' is missing"):
        load_bank(file)


@pytest.mark.parametrize("tensors", [{}, {"images": PIXELS}], ids=["nothing", "images"])
def test_a_file_without_metadata_is_refused(file: Path, tensors: dict[str, NDArray[Any]]) -> None:
    file.write_bytes(encode_safetensors(tensors))
    with pytest.raises(LoadError, match="'format' is missing"):
        load_bank(file)


def test_a_file_without_images_is_refused(file: Path) -> None:
    metadata = {"format": "els-bank", "version": "1"}
    file.write_bytes(encode_safetensors({"labels": np.arange(4)}, metadata))
    with pytest.raises(LoadError, match="'images' is missing"):
        load_bank(file)


def test_a_tensor_type_that_numpy_lacks_is_refused(file: Path) -> None:
    images = torch.zeros(4, 1, 2, 3, dtype=torch.bfloat16)
    file.write_bytes(encode_torch_safetensors({"images": images}))
    with pytest.raises(LoadError, match="'BF16' is missing or of an unknown type"):
        load_bank(file)


def test_a_failed_save_leaves_the_former_file_and_nothing_else(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError("no space left on device")

    before = file.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        save_bank(make_bank(FLOATS), file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_the_bundled_bank_holds_500_images_of_each_of_ten_classes() -> None:
    bank = load_bank(BUNDLED)
    assert bank.images.dtype == np.uint8
    assert bank.shape == (1, 28, 28)
    assert [bank.label_range(label) for label in range(10)] == [
        (500 * label, 500 * (label + 1)) for label in range(10)
    ]
    assert (bank.label_names[0], bank.label_names[9]) == ("T-shirt/top", "Ankle boot")
    assert bank.licence.startswith("MIT")


def test_the_bundled_bank_takes_at_most_3_mb_of_the_wheel() -> None:
    assert len(zlib.compress(BUNDLED.read_bytes())) <= 3_000_000
