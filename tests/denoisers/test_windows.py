import math

import numpy as np
import pytest

from els_service.denoisers.levels import cosine
from els_service.denoisers.windows import WindowTable, default_windows

ROW = [3, 3, 5, 5, 7, 7, 9, 9, 9, 11, 11, 11, 13, 13, 13, 15, 15, 15, 17, 17]
"""Fashion-MNIST, ResNet, zero padding: published with the paper, low noise first."""

TABLE = WindowTable((0.1, 1.0, 10.0), (3, 7, 9))


def windows(table: WindowTable, *sigma: float) -> list[int]:
    return [int(k) for k in table.at(np.array(sigma))]


def test_the_default_gives_the_published_row_at_its_own_times() -> None:
    sigma = cosine(np.arange(1, 21) / 20).sigma
    assert windows(default_windows(), *sigma) == ROW


def test_an_entry_is_hit_however_its_level_was_rounded() -> None:
    for sigma, k in zip(default_windows().sigma, ROW, strict=True):
        for neighbour in (math.nextafter(sigma, 0), sigma, math.nextafter(sigma, math.inf)):
            assert windows(default_windows(), neighbour) == [k]


def test_beyond_its_ends_a_table_holds_its_ends() -> None:
    assert windows(TABLE, 1e-4, 0.05, 0.1, 10, 11, 1e6) == [3, 3, 3, 9, 9, 9]


@pytest.mark.parametrize("fraction", np.linspace(0, 1, 21))
def test_between_entries_it_is_linear_in_log_sigma_and_the_nearest_odd(fraction: float) -> None:
    exact = 3 + 4 * fraction
    got = windows(TABLE, 0.1 * 10**fraction)[0]
    assert got % 2 == 1
    # 1 away at most, and up where two are equally near; half a part in 10⁹ for log and power.
    assert -1 - 1e-9 <= exact - got < 1 + 1e-9
    if abs(exact - round(exact)) < 1e-9 and round(exact) % 2 == 0:
        assert got == round(exact) + 1


def test_a_constant_is_the_same_at_every_level() -> None:
    assert windows(WindowTable.constant(5), 1e-4, 1.0, 1e6) == [5, 5, 5]


def test_clipping_shortens_the_large_windows_alone() -> None:
    assert TABLE.clipped(7) == WindowTable(TABLE.sigma, (3, 7, 7))
    assert TABLE.clipped(1) == WindowTable(TABLE.sigma, (1, 1, 1))
    assert TABLE.clipped(99) == TABLE


def test_windows_may_shrink_as_noise_grows() -> None:
    assert windows(WindowTable((1.0, 4.0), (9, 1)), 1, 2, 4) == [9, 5, 1]


@pytest.mark.parametrize(
    ("sigma", "k", "message"),
    [
        ((), (), "at least one, got 0 k and 0 sigma"),
        ((1.0, 2.0), (3,), "got 1 k and 2 sigma"),
        ((1.0,), (3, 5), "got 2 k and 1 sigma"),
        ((1.0, 1.0), (3, 5), "window.sigma: expected increasing"),
        ((2.0, 1.0), (3, 5), "window.sigma: expected increasing"),
        ((0.0, 1.0), (3, 5), "window.sigma: .*> 0"),
        ((-1.0, 1.0), (3, 5), "window.sigma: .*> 0"),
        ((1.0, math.inf), (3, 5), "window.sigma: .*finite"),
        ((math.nan,), (3,), "window.sigma: .*finite"),
        ((1.0, math.nan), (3, 5), "window.sigma: .*finite"),
        ((1.0,), (4,), "window.k: expected odd"),
        ((1.0,), (0,), "window.k: expected odd"),
        ((1.0,), (-3,), "window.k: expected odd"),
    ],
)
def test_a_malformed_table_is_refused(
    sigma: tuple[float, ...], k: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        WindowTable(sigma, k)
