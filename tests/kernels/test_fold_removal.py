"""The exact effect of removing a bank image from a fold, against the bank without it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.kernels.cases import random_bank
from tests.kernels.conftest import has_fold_row, variant
from tests.kernels.fold_cases import FOLD_NAMES, FOLD_VARIANTS, FoldCase, fold_case
from tests.kernels.fold_moment_cases import UNEQUAL, arguments, references
from tests.support.rows import telling
from torch import Tensor

from els_kernels import ComputationStoppedError, Control, FoldedMoments
from els_kernels.reference_fold_statistics import ReferenceFoldPosterior

PAIRS = [(1.0, 0.5), (0.3, float("inf")), (0.05, 0.2), (1e-4, 0.5), (0.3, 0.0)]
"""(s, ρ). Every other query is the first image of the bank, which has all weight at low noise."""

few_rows = telling(lambda form, name: has_fold_row(form, name))


@pytest.fixture(params=[variant(name) for name in ("reference", *FOLD_VARIANTS)])
def form(request: pytest.FixtureRequest) -> str:
    """One implementation, if it is to be had."""
    return str(request.param)


def cases(name: str) -> list[FoldCase]:
    geometry, alike = FOLD_NAMES[name], random_bank((3, 2, 6, 5))
    found = [fold_case(geometry, (6, 5), alike, 3, PAIRS)]
    if name.startswith("els"):
        images = [random_bank((1, 2, *size), i)[0] for i, size in enumerate(UNEQUAL)]
        found.append(fold_case(geometry, (7, 6), images, 5, PAIRS))
    return [replace(case, x=nearest(case, 0)) for case in found]


def nearest(case: FoldCase, image: int) -> Tensor:
    """Return the queries, every other one of which is a noisy part of a bank image."""
    x, own = case.x.clone(), case.bank[image]
    height, width = min(x.shape[2], own.shape[1]), min(x.shape[3], own.shape[2])
    part = own[:, :height, :width]
    x[::2, :, :height, :width] = case.a[::2, None, None, None].float() * part
    return x


def without(reference: ReferenceFoldPosterior, image: int) -> tuple[Tensor, Tensor]:
    """Return the mean of the bank without an image, and what it weighs at each pixel."""
    bank = [*reference.bank[:image], *reference.bank[image + 1 :]]
    weight = reference.weights()[image].sum(1).view(reference.x.shape[1:])
    return replace(reference, bank=bank).mean(), weight


@few_rows
@pytest.mark.parametrize("name", FOLD_NAMES)
def test_removing_an_image_equals_the_bank_without_it(form: str, name: str) -> None:
    for case in cases(name):
        operator = case.operator(form)
        for image in (0, 2):
            got = operator.without(case.x, image, **arguments(case))
            for b, reference in enumerate(references(case)):
                mean, weight = without(reference, image)
                assert (got.mean[b] - mean).abs().max() <= 1e-4
                assert (got.weight[b] - weight).abs().max() <= 1e-4
            if image == 0:
                # Patches that it alone explains: 1 - w is far below what a difference resolves.
                assert float(got.weight.max()) > 1 - 1e-6


@few_rows
@pytest.mark.parametrize("name", ["els-zeros", "els-circular", "local-inside"])
def test_a_removal_has_the_mean_of_a_bank_without_the_image_at_any_remaining_weight(
    form: str, name: str
) -> None:
    # A copy of image 0 with ever more noise: 1 - w of image 0 falls from a half to nothing.
    first = random_bank((1, 1, 6, 5))
    for gap in (0.0, 1e-3, 3e-3, 1e-2, 0.1):
        bank = torch.cat([first, first + gap * random_bank((2, 1, 6, 5), 7)])
        case = fold_case(FOLD_NAMES[name], (6, 5), bank, 3, [(1e-2, 0.5)])
        case = replace(case, x=case.a[:, None, None, None].float() * first)
        got = case.operator(form).without(case.x, 0, **arguments(case))
        rest = replace(case, bank=bank[1:]).operator(form)
        want = rest(case.x, **arguments(case)).mean
        assert (got.mean - want).abs().max() <= 1e-5


def test_an_image_outside_the_range_changes_nothing_and_one_alone_in_it_stays(form: str) -> None:
    case = cases("els-inside")[0]
    given = arguments(case) | {"ranges": torch.tensor([[1, 3]] * len(case.x))}
    operator = case.operator(form)
    # Without a fold of zero, which is that of another operator.
    some = slice(0, 4)
    got = FoldedMoments(operator).without(case.x, 0, **given)
    assert torch.equal(got.mean[some], operator(case.x, **given).mean[some])
    assert got.weight.abs().max() == 0
    given["ranges"] = torch.tensor([[2, 3]] * len(case.x))
    with pytest.raises(ValueError, match="ranges: expected two images or more"):
        operator.without(case.x, 2, **given)
    with pytest.raises(ValueError, match="image: expected 0 to 2, got 3"):
        operator.without(case.x, 3, **given)


def test_a_removal_has_the_same_bits_alone_and_in_any_batch_and_ends_when_stopped(
    form: str,
) -> None:
    case = cases("els-zeros")[0]
    operator = case.operator(form)
    every = operator.without(case.x, 0, **arguments(case))
    one = case[[2]]
    alone = operator.without(one.x, 0, **arguments(one))
    assert torch.equal(alone.mean[0], every.mean[2])
    assert torch.equal(alone.weight[0], every.weight[2])
    control = Control()
    control.stop()
    with control, pytest.raises(ComputationStoppedError):
        operator.without(case.x, 0, **arguments(case))
