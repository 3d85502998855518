"""Variance, entropy, sources and Jacobian products of a fold against the whole posterior."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tests.kernels.cases import random_bank
from tests.kernels.conftest import has_fold_row, variant
from tests.kernels.fold_cases import FOLD_NAMES, FOLD_VARIANTS, fold_case
from tests.kernels.fold_moment_cases import (
    LEAST,
    PAIRS,
    TOP,
    arguments,
    assert_product,
    assert_statistics,
    budgets,
    cases,
    directions,
    everything,
    moments,
    references,
)
from tests.support.rows import telling

from els_kernels import PatchAttention, PatchMoments

few_rows = telling(lambda form, name: has_fold_row(form, name))


@pytest.fixture(params=[variant(name) for name in FOLD_VARIANTS])
def form(request: pytest.FixtureRequest) -> str:
    """One implementation, if it is to be had."""
    return str(request.param)


@few_rows
@pytest.mark.parametrize("name", FOLD_NAMES)
def test_statistics_equal_brute_force(form: str, name: str) -> None:
    for case in cases(name):
        operator = moments(case, form)
        got = operator.statistics(case.x, **arguments(case), top=TOP)
        for b, reference in enumerate(references(case)):
            assert_statistics(got, b, reference, 0, budgets(operator, case, b, reference))


@few_rows
@pytest.mark.parametrize("name", FOLD_NAMES)
@pytest.mark.slow
def test_jacobian_products_equal_automatic_differentiation_and_are_adjoint(
    form: str, name: str
) -> None:
    for case in cases(name):
        g, u = directions(case, 1), directions(case, 2)
        operator = moments(case, form)
        mean, pulled = operator.vjp(case.x, g, **arguments(case))
        same, pushed = operator.jvp(case.x, u, **arguments(case))
        assert torch.equal(mean, same)
        for b, reference in enumerate(references(case)):
            slack = budgets(operator, case, b, reference)
            assert ((mean[b] - reference.mean()).abs() <= slack.mean).all()
            for got, want in (
                (pulled[b], reference.vjp(g[b])),
                (pushed[b], reference.jvp(u[b])),
            ):
                if form == "torch":
                    # At s = 1e-4 one patch has all the weight, and both are 0 up to rounding.
                    assert (got - want).norm() <= 1e-5 * want.norm() + 1e-9
                else:
                    assert_product(got, want, g[b])
            left, right = (pulled[b].double() * u[b]).sum(), (g[b] * pushed[b].double()).sum()
            tolerance = 1e-5 if form == "torch" else 1e-4
            assert float(left) == pytest.approx(float(right), rel=tolerance, abs=10 * tolerance)


def test_at_low_noise_near_ties_have_the_products_of_automatic_differentiation() -> None:
    # Two images that differ by less than the noise: weights of 1e-4 of noise are far from 0 and 1.
    first = random_bank((1, 1, 6, 5))
    bank = torch.cat([first, first + 2e-5 * random_bank((1, 1, 6, 5), 7)])
    for name in ("els-inside", "els-zeros", "local-circular"):
        case = fold_case(FOLD_NAMES[name], (6, 5), bank, 3, [(1e-4, 0.5)])
        case = replace(case, x=bank[:1] + 1e-5 * directions(case))
        g = directions(case)
        _, pulled = moments(case).vjp(case.x, g, **arguments(case))
        _, pushed = moments(case).jvp(case.x, g, **arguments(case))
        (reference,) = references(case)
        for got, want in ((pulled[0], reference.vjp(g[0])), (pushed[0], reference.jvp(g[0]))):
            assert want.norm() > 1e-3
            assert (got - want).norm() <= 1e-4 * want.norm()
        found = moments(case).statistics(case.x, **arguments(case), top=TOP)
        assert float(reference.entropy().max()) > 0.1
        assert (found.entropy[0] - reference.entropy()).abs().max() <= 1e-5


@few_rows
@pytest.mark.parametrize("name", FOLD_NAMES)
def test_all_sources_together_are_the_denoised_image(form: str, name: str) -> None:
    local = name.startswith("local")
    bank = random_bank((12, 2, 3, 4)) if local else random_bank((1, 2, 3, 4))
    case = fold_case(FOLD_NAMES[name], (3, 4), bank, 3, PAIRS)
    got = moments(case, form).statistics(case.x, **arguments(case), top=16)
    used = got.sources.clamp(min=0)
    values = bank[used[..., 0], :, used[..., 1], used[..., 2]]
    rebuilt = (values * got.weights[..., None]).sum(3).permute(0, 3, 1, 2)
    assert (rebuilt - got.mean).abs().max() <= 2e-6


@pytest.mark.slow
def test_ranges_of_a_bank_of_unequal_sizes_have_indices_of_the_whole_bank(form: str) -> None:
    case = cases("els-zeros")[-1][[0, 1, 2]]
    ranges = torch.tensor([[0, 2], [1, 3], [2, 3]])
    case = replace(case, ranges=ranges)
    operator = moments(case, form)
    got = operator.statistics(case.x, **arguments(case), top=TOP)
    g = directions(case)
    _, pulled = operator.vjp(case.x, g, **arguments(case))
    for b, reference in enumerate(references(case)):
        slack = budgets(operator, case, b, reference)
        assert_statistics(got, b, reference, int(ranges[b, 0]), slack)
        want = reference.vjp(g[b])
        assert (pulled[b] - want).norm() <= (1e-5 if form == "torch" else 1e-4) * want.norm()


@few_rows
@pytest.mark.parametrize("name", ["els-zeros", "els-circular", "els-valid", "local-zeros"])
@pytest.mark.slow
def test_a_fold_of_zero_has_the_moments_of_patch_attention(form: str, name: str) -> None:
    bank = random_bank((4, 2, 6, 5))
    case = fold_case(FOLD_NAMES[name], (6, 5), bank, 3, [(0.5, 0.0), (0.1, 0.0)])
    plain = PatchMoments(PatchAttention(bank, implementation="torch"), bank)
    shared = {name: value for name, value in arguments(case).items() if name != "fold"}
    got = everything(case, form=form)
    g = directions(case)
    want = [
        *plain.statistics(case.x, **shared, top=TOP),
        plain.vjp(case.x, g, **shared)[1],
        plain.jvp(case.x, g, **shared)[1],
    ]
    tolerance = 1e-6 if form == "torch" else 5e-5
    listed = want[4] > LEAST
    for index, (one, other) in enumerate(zip(got, want, strict=True)):
        if index == 3:
            assert torch.equal(one[listed], other[listed])
        else:
            assert torch.allclose(one, other, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("s", [1.0, 1e-2, 1e-4])
def test_equal_patches_have_equal_weights_at_any_level(form: str, s: float) -> None:
    # Flat images, as the background of digits is: sources of one weight, in the order of the bank.
    bank = torch.full((7, 1, 12, 12), 0.3)
    x = torch.full((1, 1, 12, 12), 0.3) + 1e-3 * s * random_bank((1, 1, 12, 12), 7)
    case = replace(
        fold_case(FOLD_NAMES["els-circular"], (12, 12), bank, 5, [(s, 0.2)]),
        x=x,
        ranges=torch.tensor([[1, 7]]),
    )
    found = moments(case, form).statistics(case.x, **arguments(case), top=16)
    assert torch.allclose(found.entropy, torch.tensor(math.log(6 * 144)), rtol=1e-6)
    assert torch.allclose(found.weights, torch.tensor(1 / (6 * 144)), rtol=1e-5)
    assert torch.allclose(found.shares[0, 1:], torch.tensor(1 / 6, dtype=torch.float64), rtol=1e-6)
    assert (found.sources[..., 0] >= 1).all()
