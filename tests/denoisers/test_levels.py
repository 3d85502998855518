import math

import numpy as np
import pytest
import torch

from els_service.denoisers.base import make_query
from els_service.denoisers.levels import (
    MAX_SIGMA,
    MIN_SIGMA,
    SCHEDULES,
    NoiseLevel,
    cosine,
    from_alpha_bar,
    from_sigma,
    from_time,
)
from els_service.errors import InvalidArgumentError


def test_sigma_is_the_noise_of_an_unscaled_signal() -> None:
    level = from_sigma([0.5, 80])
    np.testing.assert_array_equal(level.a, [1, 1])
    np.testing.assert_array_equal(level.s, [0.5, 80])
    np.testing.assert_array_equal(level.sigma, [0.5, 80])


def test_alpha_bar_preserves_variance() -> None:
    level = from_alpha_bar([0.25, 0.9])
    np.testing.assert_allclose(level.a, np.sqrt([0.25, 0.9]), rtol=1e-15)
    np.testing.assert_allclose(level.s, np.sqrt([0.75, 0.1]), rtol=1e-15)
    np.testing.assert_allclose(level.alpha_bar, [0.25, 0.9], rtol=1e-15)


def test_time_is_the_cosine_schedule_of_the_paper() -> None:
    times = np.linspace(0.01, 1, 50)
    alpha_bar = [math.cos(math.pi * t / (2 * 1.008)) ** 2 for t in times]
    level = from_time(times)
    np.testing.assert_allclose(level.a, np.sqrt(alpha_bar), rtol=1e-14)
    np.testing.assert_allclose(level.alpha_bar, alpha_bar, rtol=1e-14)
    np.testing.assert_allclose(level.a**2 + level.s**2, 1, rtol=1e-15)


def test_at_time_1_the_noise_is_80_times_the_signal() -> None:
    assert from_time([1.0]).sigma.item() == pytest.approx(80.2, abs=0.05)


def test_the_cosine_schedule_loses_no_digits_near_0() -> None:
    # 1 - cos² would have none left below t = 1e-8; tan(x) = x + x³/3 is exact to 1e-16 there.
    times = np.array([1e-4, 1e-6, 1e-10, 1e-15])
    angle = np.pi * times / 2.016
    np.testing.assert_allclose(cosine(times).sigma, angle + angle**3 / 3, rtol=1e-15)


@pytest.mark.parametrize("alpha_bar", [1e-9, 0.3, 0.5, 1 - 1e-7])
def test_two_names_of_one_ratio_are_one_level(alpha_bar: float) -> None:
    sigma = math.sqrt((1 - alpha_bar) / alpha_bar)
    assert from_alpha_bar([alpha_bar]).sigma.item() == pytest.approx(sigma, rel=1e-14)
    assert from_sigma([sigma]).alpha_bar.item() == pytest.approx(alpha_bar, rel=1e-14)


def test_the_ends_of_the_range_are_legal() -> None:
    assert from_sigma([MIN_SIGMA, MAX_SIGMA]).sigma.tolist() == [MIN_SIGMA, MAX_SIGMA]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("sigma", 0.0, "s/a from 0.0001 to 1e\\+06"),
        ("sigma", -1.0, "s/a"),
        ("sigma", math.nan, "s/a"),
        ("sigma", math.inf, "s/a"),
        ("sigma", MIN_SIGMA * 0.999, "s/a"),
        ("sigma", MAX_SIGMA * 1.001, "s/a"),
        ("alpha_bar", 0.0, "0 < alpha_bar < 1"),
        ("alpha_bar", 1.0, "0 < alpha_bar < 1"),
        ("alpha_bar", -0.1, "0 < alpha_bar < 1"),
        ("alpha_bar", 1.5, "0 < alpha_bar < 1"),
        ("alpha_bar", math.nan, "0 < alpha_bar < 1"),
        ("alpha_bar", -math.inf, "0 < alpha_bar < 1"),
        ("alpha_bar", 1e-13, "s/a"),
        ("alpha_bar", 5e-324, "s/a"),
        ("alpha_bar", 1 - 1e-15, "s/a"),
        ("time", 0.0, "0 < time <= 1"),
        ("time", -0.5, "0 < time <= 1"),
        ("time", 1.0001, "0 < time <= 1"),
        ("time", math.nan, "0 < time <= 1"),
        ("time", math.inf, "0 < time <= 1"),
        ("time", 1e-5, "s/a"),
        ("time", 5e-324, "s/a"),
    ],
)
def test_a_level_out_of_range_is_refused_by_name_and_value(
    name: str, value: float, expected: str
) -> None:
    convention = {"sigma": from_sigma, "alpha_bar": from_alpha_bar, "time": from_time}[name]
    with pytest.raises(InvalidArgumentError, match=f"level.{name}: expected {expected}") as caught:
        convention([0.5, value])
    assert caught.value.violation.got == str(np.float64(value))


def test_a_schedule_other_than_the_default_is_followed() -> None:
    level = from_time([0.5], lambda t: NoiseLevel(1 - t, 3 * t))
    assert (level.a.item(), level.s.item()) == (0.5, 1.5)
    assert SCHEDULES["cosine"] is cosine


def test_one_level_serves_every_image_and_more_are_taken_in_order() -> None:
    one = make_query(torch.zeros(3, 1, 2, 2), from_sigma([2.0]))
    assert one.level.s.tolist() == [2, 2, 2]
    each = make_query(torch.zeros(3, 1, 2, 2), from_sigma([1.0, 2.0, 3.0]))
    assert each.level[1:].s.tolist() == [2, 3]


@pytest.mark.parametrize("count", [0, 2, 4])
def test_levels_that_are_neither_one_nor_one_an_image_are_refused(count: int) -> None:
    with pytest.raises(InvalidArgumentError, match=f"level: expected 1 value or 3, got {count} "):
        make_query(torch.zeros(3, 1, 2, 2), from_sigma([1.0] * count))
