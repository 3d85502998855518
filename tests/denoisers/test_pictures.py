"""Picture files whose pixels would silently be others than the file says are rejected by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.support.pictures import DEEP, KEYED, write

from els_service.denoisers.bank_sources import read_source
from els_service.denoisers.pictures import read_picture
from els_service.errors import LoadError


@pytest.mark.parametrize("name", DEEP)
def test_colour_of_sixteen_bits_is_refused_not_cut(tmp_path: Path, name: str) -> None:
    with pytest.raises(LoadError, match=rf"{name}.*expected 8 bits a channel, got 16: convert it"):
        read_picture(write(tmp_path, DEEP, name))


@pytest.mark.parametrize("name", KEYED)
def test_a_transparent_colour_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(LoadError, match=rf"{name}.*expected no transparent colour"):
        read_picture(write(tmp_path, KEYED, name))


@pytest.mark.parametrize("suffix", ["png", "ppm", "tiff", "bmp", "webp"])
def test_pictures_of_eight_bits_are_read(tmp_path: Path, suffix: str) -> None:
    pixels = np.full((4, 5, 3), 7, np.uint8)
    Image.fromarray(pixels).save(path := tmp_path / f"a.{suffix}")
    assert np.abs(read_picture(path).astype(int) - 7).max() <= 1


def test_label_folders_named_by_numbers_sort_as_numbers(tmp_path: Path) -> None:
    for name in ("0", "2", "10"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((4, 5), int(name), np.uint8)).save(tmp_path / name / "a.png")
    bank = read_source(tmp_path)
    assert bank.label_names == ("0", "2", "10")
    assert bank.images[:, 0, 0, 0].tolist() == [0, 2, 10]
