"""Variance, entropy, sources and Jacobian products against the whole posterior in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.kernels.cases import NAMES, random_case, relative_errors
from tests.kernels.conftest import variant, widest
from tests.kernels.moment_budgets import Budgets, budgets
from tests.kernels.moment_cases import (
    FORMS,
    SHAPES,
    arguments,
    directions,
    exact,
    low_noise,
    moments,
    references,
    windows_of,
)
from tests.support.rows import telling
from torch import Tensor

from els_kernels import GEOMETRIES, Geometry

LEVELS = [None, 1e-2, 1e-4]


def few(name: str, position: int) -> bool:
    """Return whether narrower vectors have a row: every machine with a window, in turn."""
    return not NAMES[name].whole and [*NAMES].index(name) % 3 == position


@pytest.fixture(params=[variant(name) for name in FORMS])
def form(request: pytest.FixtureRequest) -> str:
    """One implementation, if it is to be had."""
    return str(request.param)


@telling(lambda form, geometry, shape: widest(form) or few(geometry, SHAPES.index(shape)))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_jacobian_products_equal_automatic_differentiation(
    form: str, geometry: Geometry, shape: tuple[int, int, int, int]
) -> None:
    case = random_case(geometry, shape, windows_of(geometry, shape))
    g = directions(case)
    mean, pulled = moments(case, form).vjp(case.x, g, **arguments(case))
    same_mean, pushed = moments(case, form).jvp(case.x, g, **arguments(case))
    assert torch.equal(mean, same_mean)
    for b, reference in enumerate(references(case)):
        own = reference.mean()
        least = 1e-7 * float(own.abs().max()) + 1e-12
        assert (mean[b] - own).abs().max() <= (least if exact(form, geometry) else 2e-6)
        for got, want in ((pulled[b], reference.vjp(g[b])), (pushed[b], reference.jvp(g[b]))):
            # Float64 throughout, rounded once to float32; or 1e-4 of the product, or of a tenth of
            # what it would be if D were x, where it is nearly 0 as one source has all the weight.
            slack = 1e-7 * float(want.abs().max()) + 1e-12
            if not exact(form, geometry):
                slack = 1e-4 * max(float(want.abs().max()), 0.1 * float(g[b].abs().max()))
            assert (got - want).abs().max() <= slack


def test_jacobian_products_equal_central_differences(geometry: Geometry) -> None:
    case = random_case(geometry, (6, 2, 5, 4), windows_of(geometry, (6, 2, 5, 4)))
    u = directions(case)
    _, pushed = moments(case).jvp(case.x, u, **arguments(case))
    for b, reference in enumerate(references(case)):
        step = 1e-5 * reference.s
        x = reference.x.double()
        ahead, behind = (reference.mean(x + d * u[b].double()) for d in (step, -step))
        difference = (ahead - behind) / (2 * step)
        assert (pushed[b] - difference).abs().max() <= 1e-6 * difference.abs().max() + 1e-9


def test_the_two_products_are_adjoint_and_symmetric_for_whole_windows_alone(
    form: str, geometry: Geometry
) -> None:
    case = random_case(geometry, (9, 2, 5, 4), None if geometry.whole else [3])
    case = replace(case, a=torch.full_like(case.a, 0.8), s=torch.full_like(case.s, 0.6))
    g, u = directions(case, 1), directions(case, 2)
    _, pulled = moments(case, form).vjp(case.x, g, **arguments(case))
    _, pushed = moments(case, form).jvp(case.x, u, **arguments(case))
    left = (pulled.double() * u).sum((1, 2, 3))
    right = (g * pushed.double()).sum((1, 2, 3))
    atol = 1e-6 if exact(form, geometry) else 1e-5
    assert torch.allclose(left, right, rtol=1e-5, atol=atol)
    _, symmetric = moments(case, form).jvp(case.x, g, **arguments(case))
    if geometry.whole:
        assert torch.equal(symmetric, pulled)
    else:
        assert relative_errors(symmetric, pulled).max() > 1e-3


@telling(lambda form, geometry, s: widest(form) or few(geometry, LEVELS.index(s)))
@pytest.mark.parametrize("s", LEVELS)
def test_statistics_equal_brute_force(form: str, geometry: Geometry, s: float | None) -> None:
    shape = (5, 2, 5, 4)
    case = random_case(geometry, shape, windows_of(geometry, shape))
    if s is not None:
        case = low_noise(case, s)
    operator = moments(case, form)
    got = operator.statistics(case.x, **arguments(case), top=5)
    for b, reference in enumerate(references(case)):
        lo, hi = case.ranges[b].tolist()
        slack = budgets(operator, case, b, reference)
        assert ((got.mean[b] - reference.mean()).abs() <= slack.mean).all()
        assert ((got.variance[b] - reference.variance()).abs() <= slack.variance).all()
        assert ((got.entropy[b] - reference.entropy()).abs() <= slack.entropy).all()
        shares = got.shares[b]
        assert ((shares[lo:hi] - reference.shares()).abs() <= slack.shares).all()
        assert abs(float(shares.sum()) - 1) <= 1e-9
        assert_sources(got.sources[b], got.weights[b], reference.log_weights().exp(), lo, slack)


def assert_sources(
    sources: Tensor, weights: Tensor, every: Tensor, lo: int, slack: Budgets
) -> None:
    """Assert that sources have the weights that are given, and that these are the largest."""
    width = sources.shape[1]
    listed, given = sources.flatten(0, 1), weights.flatten(0, 1)
    largest = every.flatten(1).sort(descending=True).values[:, : given.shape[1]]
    within = slack.weights.flatten(1).amax(1)[:, None] + 1e-6 * largest
    assert ((given[:, : largest.shape[1]] - largest).abs() <= within).all()
    assert (given[:, largest.shape[1] :] == 0).all()
    assert (given.diff(dim=1) <= 0).all()
    for place, (rows, own) in enumerate(zip(listed, given, strict=True)):
        kept = [tuple(source) for source in rows.tolist() if source[0] >= 0]
        assert len(set(kept)) == len(kept)
        assert len(kept) >= min(len(rows), int((every[place] > 0).sum()))
        for (image, row, col), weight in zip(kept, own.tolist(), strict=False):
            want = float(every[place, image - lo, row * width + col])
            error = float(slack.weights[place, image - lo, row * width + col])
            assert abs(weight - want) <= max(1e-6 * want, error)


def test_all_sources_together_are_the_denoised_image(form: str, geometry: Geometry) -> None:
    case = random_case(geometry, (3, 2, 2, 2), None if geometry.whole else [1])
    got = moments(case, form).statistics(case.x, **arguments(case), top=16)
    used = got.sources.clamp(min=0)
    values = case.bank[used[..., 0], :, used[..., 1], used[..., 2]]
    rebuilt = (values * got.weights[..., None]).sum(3).permute(0, 3, 1, 2)
    assert (rebuilt - got.mean).abs().max() <= 1e-6


def test_the_variance_is_the_jacobian_of_a_pixel_by_itself(form: str, geometry: Geometry) -> None:
    case = random_case(geometry, (5, 1, 4, 5), None if geometry.whole else [3])[[0]]
    variance = moments(case, form).statistics(case.x, **arguments(case)).variance[0, 0]
    scale = float(case.a[0] / case.s[0] ** 2)
    for row, col in [(0, 0), (1, 3), (3, 4)]:
        unit = torch.zeros_like(case.x)
        unit[0, 0, row, col] = 1
        _, pushed = moments(case, form).jvp(case.x, unit, **arguments(case))
        assert float(pushed[0, 0, row, col]) == pytest.approx(
            scale * float(variance[row, col]),
            rel=1e-5,
            abs=1e-9 if exact(form, geometry) else 1e-6 * scale,
        )


@pytest.mark.parametrize("s", [10.0, 1e-3])
def test_removing_an_image_equals_the_bank_without_it(geometry: Geometry, s: float) -> None:
    case = random_case(geometry, (5, 2, 4, 5), None if geometry.whole else [3])
    case = low_noise(replace(case, ranges=torch.tensor([[0, 5]] * len(case))), s)
    # The queries are image 0 with noise: at low noise it weighs 1 and has to be recomputed.
    removed = moments(case).without(case.x, 0, **arguments(case))
    assert (float(removed.weight.max()) > 1 - 1e-6) == (s == 1e-3)
    for b, reference in enumerate(references(case)):
        rest = replace(reference, bank=reference.bank[1:])
        assert (removed.mean[b] - rest.mean()).abs().max() <= 1e-6
        weight = reference.log_weights().exp()[:, 0].sum(1).view(4, 5)
        assert (removed.weight[b] - weight).abs().max() <= 1e-6


def test_removing_an_image_outside_the_range_changes_nothing() -> None:
    case = random_case(GEOMETRIES["els", "zeros"], (5, 1, 4, 5), [3])
    case = replace(case, ranges=torch.tensor([[1, 4]] * len(case)))
    removed = moments(case).without(case.x, 4, **arguments(case))
    assert (removed.mean - case.attend("reference").mean).abs().max() <= 1e-7
    assert removed.weight.abs().max() == 0
