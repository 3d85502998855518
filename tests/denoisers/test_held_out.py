"""Windows by leave-one-out error: what theory says of known banks, and never worse than fixed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from els_kernels import GEOMETRIES
from els_service.denoisers.banks import Bank, load_bank, make_bank
from els_service.denoisers.windows import WindowTable, default_windows
from els_service.errors import InvalidArgumentError
from els_service.experiments import held_out
from els_service.experiments.held_out import (
    Sampling,
    affordable,
    choose_windows,
    default_levels,
    default_windows_to_try,
    draw,
    held_out_errors,
)

ELS = GEOMETRIES["els", "zeros"]
CIRCULAR = GEOMETRIES["els", "circular"]
FASHION = Path(held_out.__file__).parents[1] / "bundled/_banks/fashion-mnist-5000.safetensors"
NUMBERS = np.random.default_rng(0)


def blocks(size: int, images: int = 96, side: int = 16) -> Bank:
    """Return images of independent black or white squares; their grid begins anywhere."""
    count = side // size + 2
    grid = NUMBERS.integers(0, 2, (images, count, count))
    large = grid.repeat(size, 1).repeat(size, 2)
    begins = NUMBERS.integers(0, size, (images, 2))
    cut = [of[y : y + side, x : x + side] for of, (y, x) in zip(large, begins, strict=True)]
    return make_bank(np.stack(cut)[:, None].astype(np.uint8) * 255)


def chosen(bank: Bank, levels: tuple[float, ...], windows: tuple[int, ...]) -> tuple[int, ...]:
    found = choose_windows(
        bank, CIRCULAR, how=Sampling(128), levels=levels, windows=windows, report=lambda *_: None
    )
    return found.table.k


def test_independent_pixels_have_a_window_of_one() -> None:
    # Neighbours say nothing about a pixel, and only make similar patches rare.
    bank = make_bank(NUMBERS.integers(0, 256, (8, 1, 12, 12)).astype(np.uint8))
    assert chosen(bank, (0.1, 0.3), (1, 3, 5, 7)) == (1, 1)
    errors = held_out_errors(bank, CIRCULAR, [(1.0, 1), (1.0, 3), (1.0, 7)], Sampling(512))
    for k in (3, 7):
        less, spread = errors.difference((1.0, k), (1.0, 1))
        assert less > -2 * spread, k


def test_equal_pixels_have_the_largest_window_where_noise_is_large() -> None:
    # The image is one number, and its best estimate the mean over as many pixels as possible.
    levels: NDArray[np.uint8] = NUMBERS.integers(0, 256, (64, 1, 1, 1)).astype(np.uint8)
    bank = make_bank(np.tile(levels, (1, 1, 9, 9)))
    assert chosen(bank, (1.0, 2.0), (1, 3, 5, 7, 9)) == (9, 9)


def test_independent_squares_have_a_window_of_about_their_size() -> None:
    # A window of twice the square holds all of it, wherever its centre is, and sees where the grid
    # begins; a larger one holds nothing more about the centre.
    for size, least, most in ((2, 3, 5), (4, 5, 9)):
        (k,) = chosen(blocks(size), (1.0,), (1, 3, 5, 7, 9, 11, 13))
        assert least <= k <= most, (size, k)


def test_no_image_is_denoised_by_itself() -> None:
    bank = make_bank(NUMBERS.integers(0, 256, (12, 1, 6, 6)).astype(np.uint8))
    error = held_out_errors(bank, ELS, [(0.01, 5)], Sampling(64)).mean((0.01, 5))[0]
    # With itself in the bank an image would be found at so low a noise, without error.
    assert error > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fashion", "squares"])
def test_chosen_windows_are_no_worse_than_the_published_ones_on_other_queries(name: str) -> None:
    bank = load_bank(FASHION) if name == "fashion" else blocks(3)
    if name == "fashion":
        bank = make_bank(bank.images[::50].copy(), bank.labels[::50].copy())
    levels = (0.1, 0.5, 5.0)
    published = default_windows().clipped(27 if name == "fashion" else 31)
    found = choose_windows(bank, ELS, how=Sampling(48), levels=levels, also=published)
    for sigma, k in zip(levels, found.table.k, strict=True):
        theirs = int(published.at(np.array([sigma]))[0])
        fresh = held_out_errors(bank, ELS, [(sigma, k), (sigma, theirs)], Sampling(96, seed=1))
        worse, spread = fresh.difference((sigma, k), (sigma, theirs))
        assert worse <= 2 * spread, (sigma, k, theirs, worse, spread)


def test_a_bracket_finds_what_trying_every_window_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, levels, windows = blocks(3), (0.3, 1.0), (1, 3, 5, 7, 9)
    every = choose_windows(bank, ELS, how=Sampling(64), levels=levels, windows=windows)
    names: list[str] = []
    monkeypatch.setattr(held_out, "_CHEAP", 0)
    # A pilot that is wrong, so that the bracket has to grow.
    monkeypatch.setattr(held_out, "part_of", lambda bank, share: blocks(1, 8))
    few = choose_windows(
        bank,
        ELS,
        how=Sampling(64),
        levels=levels,
        windows=windows,
        also=WindowTable.constant(11),
        report=lambda name, done, total: names.append(name),
    )
    assert few.table == every.table
    assert {"pilot", "whole bank"} <= set(names)
    for sigma, k in zip(levels, few.table.k, strict=True):
        assert {k - 2, k, k + 2} & set(windows) <= set(few.errors.windows(sigma))
        assert few.errors.mean((sigma, k)) == pytest.approx(every.errors.mean((sigma, k)), rel=1e-4)


def test_by_label_only_images_of_the_same_label_answer() -> None:
    pixels = NUMBERS.integers(0, 256, (9, 1, 4, 4)).astype(np.uint8)
    bank = make_bank(pixels, [0, 0, 0, 0, 1, 1, 1, 1, 2])
    held = draw(bank, Sampling(40, by_label=True))
    assert set(held.ranges) == {(0, 4), (4, 8)}
    assert 8 not in held.images
    assert set(draw(bank, Sampling(40)).ranges) == {(0, 9)}
    with pytest.raises(InvalidArgumentError, match="bank: expected at least 2 images"):
        draw(make_bank(pixels[:1]), Sampling(8))


def test_the_standard_error_counts_images_and_not_their_pixels() -> None:
    bank = make_bank(NUMBERS.integers(0, 256, (4, 1, 6, 6)).astype(np.uint8))
    errors = held_out_errors(bank, ELS, [(1.0, 3)], Sampling(64))
    values, images = errors.cells[1.0, 3], errors.images.numpy()
    by_image = np.array([values[images == m].mean() for m in range(4)])
    assert errors.mean((1.0, 3))[1] == pytest.approx(by_image.std() / 2)


def test_default_candidates_fit_the_images() -> None:
    small = make_bank(np.zeros((2, 1, 6, 9), np.uint8))
    assert default_windows_to_try(small, ELS) == (1, 3, 5)
    large = make_bank(np.zeros((2, 3, 64, 64), np.uint8))
    assert default_windows_to_try(large, ELS)[-6:] == (15, 17, 21, 25, 29, 33)
    assert default_levels()[0] == pytest.approx(0.078, rel=0.01)
    for windows in ((2,), (65,), (-1,)):
        with pytest.raises(InvalidArgumentError, match="windows: expected odd numbers from 1 to"):
            choose_windows(large, CIRCULAR, how=Sampling(8), windows=windows)


def test_five_thousand_photographs_take_minutes_and_smaller_banks_are_used_whole() -> None:
    large = make_bank(np.zeros((5000, 3, 64, 64), np.uint8))
    assert 500 < affordable(large, ELS, Sampling()) < 1000
    assert 64 < affordable(large, ELS, Sampling(960)) < 100
    assert affordable(large, ELS, Sampling(9600)) == 64
    assert affordable(large, ELS, Sampling(), (3, 5, 7)) > 1200
    small = make_bank(np.zeros((5000, 1, 28, 28), np.uint8))
    assert affordable(small, ELS, Sampling()) == 5000
    assert affordable(large, GEOMETRIES["local", "zeros"], Sampling()) == 5000
    labelled = make_bank(large.images, [i % 10 for i in range(5000)])
    assert affordable(labelled, ELS, Sampling(by_label=True)) == 5000
