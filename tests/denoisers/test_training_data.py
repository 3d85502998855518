"""Training data: parts of any format, joined by the names of their labels; faults named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.support.commands import run
from tests.support.training import bars

from els_service.denoisers.bank_build_records import Request
from els_service.denoisers.bank_builds import build_parts
from els_service.denoisers.bank_selection import Source
from els_service.denoisers.banks import make_bank, save_bank
from els_service.errors import InvalidArgumentError
from els_service.experiments.training import load_training_data


def test_data_may_come_in_parts_of_any_format(tmp_path: Path) -> None:
    pixels, labels = bars()
    np.savez(tmp_path / "first.npz", images=pixels[:20], labels=labels[:20])
    save_bank(make_bank(pixels[20:, None], labels[20:]), tmp_path / "rest.safetensors")
    parts = [tmp_path / "first.npz", tmp_path / "rest.safetensors"]
    joined = load_training_data(parts, label_names=("flat", "tall"), source="bars", licence="MIT")
    whole = make_bank(pixels[:, None], labels, label_names=("flat", "tall"))
    assert joined.fingerprint == whole.fingerprint
    assert (joined.source, joined.licence) == ("bars", "MIT")
    assert load_training_data(parts[:1], resize=(4, 6), limit=5).images.shape == (5, 1, 4, 6)
    np.savez(tmp_path / "other.npz", images=pixels[:20, :7], labels=labels[:20])
    np.savez(tmp_path / "bare.npz", images=pixels)
    for name, expected in (("other", "of shape"), ("bare", "parts with labels")):
        with pytest.raises(InvalidArgumentError, match=expected):
            load_training_data([parts[0], tmp_path / f"{name}.npz"])
    with pytest.raises(InvalidArgumentError, match="resize: expected sides from 1 to 4096"):
        load_training_data(parts[:1], resize=(8, 4097))
    with pytest.raises(InvalidArgumentError, match="data: expected a data set where"):
        load_training_data([parts[1]], limit=3)


def test_a_bank_in_parts_is_data_too(tmp_path: Path) -> None:
    pixels, labels = bars()
    source = Source(tmp_path, pixels[..., None], labels=np.asarray(labels))
    build_parts(source, (), tmp_path / "bank", Request(7))
    loaded = load_training_data([tmp_path / "bank"], source="bars")
    assert loaded.fingerprint == make_bank(pixels[:, None], labels).fingerprint


def test_parts_are_joined_by_the_names_of_their_labels(tmp_path: Path) -> None:
    parts: list[Path] = []
    for names, licence in ((("cat", "dog"), "MIT"), (("dog", "zebra"), "CC0"), ((), "MIT")):
        images = np.full((4, 1, 8, 8), len(parts), np.uint8)
        labels, path = np.array([0, 1, 1, 0]), tmp_path / f"{len(parts)}.safetensors"
        save_bank(
            make_bank(images, labels, label_names=names, source="here", licence=licence), path
        )
        parts.append(path)
    joined = load_training_data(parts[:2])
    assert (joined.source, joined.licence) == ("here", "MIT; CC0")
    assert joined.label_names == ("cat", "dog", "zebra")
    part, label = joined.images[:, 0, 0, 0].tolist(), joined.labels.tolist()
    found = {(i, joined.label_names[n]) for i, n in zip(part, label, strict=True)}
    assert found == {(0, "cat"), (0, "dog"), (1, "dog"), (1, "zebra")}
    with pytest.raises(InvalidArgumentError, match="parts that all name their labels, or none"):
        load_training_data(parts)
    assert load_training_data(parts, labelled=False).label_count == 2
    again = tmp_path / "again.safetensors"
    save_bank(make_bank(images, labels, label_names=("dog", "dog")), again)
    with pytest.raises(InvalidArgumentError, match="another name for each label"):
        load_training_data([parts[0], again])
    # A label without images takes no number, and what says no licence is not under another's.
    save_bank(make_bank(images, np.ones(4, int), label_names=("", "dog")), again)
    gap = load_training_data([parts[0], again])
    assert (gap.label_names, np.bincount(gap.labels).tolist()) == (("cat", "dog"), [2, 6])
    assert (gap.source, gap.licence) == ("here; again.safetensors", "MIT; unstated")
    read = load_training_data(parts, label_names=("a", "b"))
    assert (read.label_count, read.label_names) == (2, ("a", "b"))


@pytest.mark.parametrize("broken", ["bank.safetensors", "pictures.npz", "folder"])
def test_a_corrupt_file_is_named_before_the_first_step(tmp_path: Path, broken: str) -> None:
    path = tmp_path / broken
    if broken == "folder":
        path.mkdir()
        Image.new("L", (8, 8)).save(path / "0.png")
        path = path / "1.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n no more")
    else:
        path.write_bytes(b"PK\x03\x04 no more")
    result = run("train", "--data", tmp_path / broken, "--out", tmp_path / "out")
    assert (result.exit_code, path.name in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "out").exists()
