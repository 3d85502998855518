"""How alike two images are, and how sure a median is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from els_service.experiments.comparison.agreement import (
    agreement,
    mean_interval,
    median_interval,
)


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_agreement_is_that_of_the_textbook() -> None:
    target, other = images(5, 3, 4, 6), images(5, 3, 4, 6, seed=1)
    found = agreement(0.5 * target + other, target)
    for i in range(5):
        got, want = (of.double()[i].flatten().numpy() for of in (0.5 * target + other, target))
        assert found.pearson_r[i] == pytest.approx(np.corrcoef(got, want)[0, 1])
        assert found.explained[i] == pytest.approx(1 - ((got - want) ** 2).mean() / want.var())
        assert found.mse[i] == pytest.approx((((got + 1) / 2 - (want + 1) / 2) ** 2).mean())
    np.testing.assert_allclose(found.r2, found.pearson_r**2)


def test_scale_and_offset_lower_what_is_explained_but_not_r() -> None:
    target = images(3, 1, 8, 8)
    target -= target.mean((1, 2, 3), keepdim=True)
    halved, turned = agreement(target / 2, target), agreement(-target, target)
    np.testing.assert_allclose(halved.pearson_r, 1)
    np.testing.assert_allclose(halved.explained, 0.75, rtol=1e-5)
    np.testing.assert_allclose(turned.pearson_r, -1)
    np.testing.assert_allclose(turned.explained, -3, rtol=1e-5)


def test_images_without_contrast_agree_with_nothing() -> None:
    flat, target = torch.zeros(1, 1, 4, 4), images(1, 1, 4, 4)
    for pair in ((flat, target), (target, flat)):
        found = agreement(*pair)
        assert found.pearson_r == 0
        assert np.isfinite(found.explained)


def test_the_interval_holds_the_median_and_shrinks_with_more_images() -> None:
    values = np.random.default_rng(0).normal(size=400)
    few, many = median_interval(values[:25]), median_interval(values)
    assert few[0] == np.median(values[:25])
    assert few[1] < few[0] < few[2]
    # The standard error of a normal median is 1.2533 / √N.
    assert many[2] - many[1] == pytest.approx(2 * 1.96 * 1.2533 / 20, rel=0.3)
    assert median_interval(values) == many


def test_the_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    values = np.random.default_rng(1).exponential(size=400)
    mean, low, high = mean_interval(values)
    assert mean == values.mean()
    assert low < mean < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
