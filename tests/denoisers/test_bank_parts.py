"""A bank in parts is the bank of one file, whatever range of it is read."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.bank_parts import write_parts

from els_service.denoisers.bank_files import save_bank
from els_service.denoisers.bank_parts import MANIFEST, BankReader, Manifest, Part, load_parts
from els_service.denoisers.banks import Bank, make_bank
from els_service.denoisers.mixed_banks import load_any_bank
from els_service.errors import InvalidArgumentError, LoadError

PIXELS = np.random.default_rng(0).integers(0, 256, (11, 3, 4, 5), np.uint8)
LABELS = np.array([0, 0, 0, 1, 1, 1, 1, 1, 3, 3, 3])
BOUNDS = [0, 4, 8, 11]


def whole() -> Bank:
    names = [f"{index}.png" for index in range(len(PIXELS))]
    return make_bank(
        PIXELS,
        LABELS,
        label_names=("a", "b", "c", "d"),
        source="there",
        licence="MIT",
        file_names=names,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_parts(tmp_path / "bank", whole(), BOUNDS)


def edit(folder: Path, **changes: object) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", ["", MANIFEST])
def test_a_bank_in_parts_is_the_bank_of_one_file(folder: Path, name: str) -> None:
    bank, expected = load_any_bank(folder / name), whole()
    assert bank.fingerprint == expected.fingerprint
    assert (bank.source, bank.licence, bank.label_names) == ("there", "MIT", ("a", "b", "c", "d"))
    assert list(bank.file_names or ()) == list(expected.file_names or ())
    assert isinstance(bank, Bank)
    np.testing.assert_array_equal(bank.images, PIXELS)


@pytest.mark.parametrize("kind", ["float32", "unlabelled"])
def test_floats_and_banks_without_labels_have_parts_too(tmp_path: Path, kind: str) -> None:
    if kind == "float32":
        bank = make_bank(PIXELS.astype(np.float32) / 255, LABELS)
    else:
        bank = make_bank(PIXELS)
    assert load_parts(write_parts(tmp_path / "bank", bank, BOUNDS)).fingerprint == bank.fingerprint


@pytest.mark.parametrize("start", range(0, 11, 2))
@pytest.mark.parametrize("stop", [1, 4, 5, 8, 11])
def test_every_range_has_the_images_and_labels_of_the_whole(
    folder: Path, start: int, stop: int
) -> None:
    reader = BankReader(folder)
    if start >= stop:
        with pytest.raises(InvalidArgumentError, match="range: expected 0 <= start < stop <= 11"):
            reader.bank(start, stop)
        return
    bank = reader.bank(start, stop)
    np.testing.assert_array_equal(bank.images, PIXELS[start:stop])
    np.testing.assert_array_equal(bank.labels, LABELS[start:stop])
    assert list(bank.file_names or ()) == [f"{index}.png" for index in range(start, stop)]


def test_a_range_within_a_part_is_a_view_of_its_file(folder: Path) -> None:
    reader = BankReader(folder)
    one, again = reader.images(5, 7), reader.images(4, 8)
    assert np.shares_memory(one, again)
    assert not np.shares_memory(reader.images(3, 5), again)
    # What torch takes without a copy; the file keeps its bytes.
    one[:] = 0
    assert load_parts(folder).fingerprint == whole().fingerprint


def test_a_reader_knows_labels_without_reading_a_part(folder: Path) -> None:
    for part in folder.glob("*.safetensors"):
        part.unlink()
    reader = BankReader(folder)
    assert (len(reader), reader.shape, reader.label_count) == (11, (3, 4, 5), 4)
    assert reader.label_range(1) == (3, 8)
    assert reader.fingerprint == whole().fingerprint
    with pytest.raises(LoadError, match=r"1\.safetensors: No such file"):
        reader.images(5, 7)


def test_a_reader_takes_a_single_file(tmp_path: Path) -> None:
    save_bank(bank := whole(), path := tmp_path / "bank.safetensors")
    reader = BankReader(path)
    assert (reader.fingerprint, len(reader)) == (bank.fingerprint, 11)
    np.testing.assert_array_equal(reader.images(2, 9), PIXELS[2:9])


@pytest.mark.parametrize("damage", ["missing", "truncated", "longer", "pixel", "header", "other"])
def test_a_part_that_is_not_the_one_of_the_manifest_is_named(folder: Path, damage: str) -> None:
    path = folder / "1.safetensors"
    data = bytearray(path.read_bytes())
    match damage:
        case "missing":
            path.unlink()
        case "truncated":
            path.write_bytes(data[:-1])
        case "longer":
            path.write_bytes(data + b"\0")
        case "pixel":
            data[-70] ^= 1
            path.write_bytes(data)
        case "header":
            path.write_bytes(data.replace(b"there", b"where"))
        case "other":
            save_bank(make_bank(PIXELS[:4], np.ones(4, int)), path)
    (folder / "0.safetensors").touch()
    reader = BankReader(folder)
    assert len(reader.images(0, 3)) == 3
    for read in (lambda: reader.images(4, 5), reader.verify, lambda: load_parts(folder)):
        with pytest.raises(LoadError, match=r"1\.safetensors: "):
            read()
    if damage == "other":
        expected = r"1\.safetensors: fingerprint: expected [0-9a-f]{64}, got [0-9a-f]{64}"
        with pytest.raises(LoadError, match=expected):
            reader.verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"licence": "none"}, "checksum"),
        ({"version": 2}, "version: expected els-bank-parts version 1, got els-bank-parts 2"),
        ({"parts": []}, "checksum"),
        ({"labels": 7}, "not a manifest"),
        ({"parts": [{"file": "0.safetensors"}]}, "not a manifest"),
    ],
)
def test_an_edited_manifest_is_rejected(
    folder: Path, change: dict[str, object], message: str
) -> None:
    edit(folder, **change)
    with pytest.raises(LoadError, match=rf"manifest\.json: .*{message}"):
        BankReader(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b"[" * 100_000])
def test_what_is_no_manifest_is_rejected_by_name(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(LoadError, match=r"manifest\.json: not a manifest of a bank"):
        BankReader(folder)


def rewritten(folder: Path, **changes: Any) -> None:
    """Write a manifest with a right checksum."""
    changed: Any = dataclasses.replace(Manifest.read(folder / MANIFEST), **changes)
    (folder / MANIFEST).write_bytes(changed.encode())


@pytest.mark.parametrize("how", ["path", "link"])
def test_a_part_outside_the_folder_is_rejected(tmp_path: Path, folder: Path, how: str) -> None:
    outside = tmp_path / "0.safetensors"
    (folder / "0.safetensors").rename(outside)
    first, *rest = Manifest.read(folder / MANIFEST).parts
    if how == "path":
        rewritten(folder, parts=(Part("../0.safetensors", first.images, first.fingerprint), *rest))
    else:
        (folder / "0.safetensors").symlink_to(outside)
    with pytest.raises(LoadError, match="expected names of files in its folder"):
        BankReader(folder).images(0, 1)


def test_a_wrong_fingerprint_of_the_whole_is_rejected(folder: Path) -> None:
    rewritten(folder, fingerprint="0" * 64)
    for read in (BankReader(folder).verify, lambda: load_parts(folder)):
        with pytest.raises(LoadError, match=r"fingerprint: expected 0000.*, that of all parts"):
            read()


@pytest.mark.parametrize(
    "changes", [{"labels": ((0, 11),)}, {"dtype": "float32"}, {"shape": (1, 12, 5)}]
)
def test_parts_with_other_contents_than_described_are_rejected(
    folder: Path, changes: dict[str, object]
) -> None:
    rewritten(folder, **changes)
    with pytest.raises(LoadError, match=r"0\.safetensors: expected"):
        BankReader(folder).images(0, 1)
