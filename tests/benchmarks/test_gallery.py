"""The gallery: its page and strips belong together, are small, and may be shown."""

from __future__ import annotations

from dataclasses import replace

import pytest
from benchmarks import gallery
from PIL import Image


def test_the_page_is_that_of_the_drawn_strips() -> None:
    rows = gallery.times()
    assert list(rows) == [one.name for one in gallery.PHOTOGRAPHS]
    assert gallery.PAGE.read_text() == gallery.page(rows)


def test_strips_are_small_and_have_a_row_of_their_own() -> None:
    files = sorted(gallery.FOLDER.glob("*.webp"))
    assert [file.stem for file in files] == sorted(gallery.times())
    assert sum(file.stat().st_size for file in files) < gallery.MOST_BYTES
    for file in files:
        with Image.open(file) as strip:
            assert strip.width > 4 * strip.height / 2


def test_every_photograph_has_a_notice() -> None:
    notices = (gallery.ROOT / "THIRD_PARTY_NOTICES.md").read_text()
    for one in gallery.PHOTOGRAPHS:
        assert f"*{one.name}*" in notices
        assert one.author in " ".join(notices.split())


def test_the_photograph_of_the_demo_is_small() -> None:
    with Image.open(gallery.DEMO_FILE) as photo:
        assert max(photo.size) == gallery.DEMO_SIDE
        assert photo.mode == "RGB"


def test_a_photograph_without_the_licence_is_rejected() -> None:
    pytest.importorskip("skimage", reason="needs scikit-image: pip install 'els-denoise[gallery]'")
    free = gallery.PHOTOGRAPHS[0]
    assert max(gallery.photo_of(free).size) == gallery.LONG_SIDE
    with pytest.raises(ValueError, match="moon: expected the licence CC0"):
        gallery.photo_of(replace(free, name="moon", licence="CC0"))
