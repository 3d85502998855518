"""Posterior moments in Triton, interpreted without a GPU: few and small cases, as that is slow.

Budgets of statistics follow from the error of a logit, as those of the native form do; budgets of
Jacobian products are those of the native form.
"""

from __future__ import annotations

import math
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from tests.kernels.cases import NAMES, Case, operator, random_case
from tests.kernels.moment_budgets import Budgets, posterior_budgets
from tests.kernels.moment_cases import arguments, directions, low_noise, references
from tests.kernels.test_moments import assert_sources
from torch import Tensor

from els_kernels import PatchAttention, PatchMoments, PosteriorStatistics
from els_kernels.reference_statistics import ReferencePosterior

# The project has to work without triton.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("triton") is None,
        reason="triton is not installed: pip install 'els-denoise[gpu]'",
    ),
]

# Not els-valid: its crops and rings are those that the fold is tested with.
WINDOWED = ["local-zeros", "local-circular", "els-zeros", "els-circular"]


def moments(case: Case) -> PatchMoments:
    """Return the operator in Triton, on a GPU where there is one."""
    attention = operator(case.bank, "triton")
    return PatchMoments(attention, case.bank.to(attention.device))


def on_device(case: Case, found: PatchMoments) -> Tensor:
    return case.x.to(found._bank.device)


def statistics_of(case: Case, top: int = 5) -> PosteriorStatistics:
    found = moments(case)
    got = found.statistics(on_device(case, found), **arguments(case), top=top)
    return PosteriorStatistics(*(field.cpu() for field in got))


def evidence_of(case: Case) -> Tensor:
    found = moments(case)
    return found.evidence(on_device(case, found), **arguments(case)).cpu()


def budgets_of(evidence: Tensor, reference: ReferencePosterior) -> Budgets:
    """Return budgets for logits of which each is wrong by 2^-21 of itself at most.

    Its terms are split into two of 11 bits, and added to float32 a few times. Logits that exceed
    the largest by 64 bits have no weight.
    """
    error = 2.0**-21 * (float(evidence[:, -2].abs().max()) + 64)
    weights = reference.log_weights().exp()
    values = reference.bank.double().flatten(2).movedim(1, 0).flatten(1)
    slack = posterior_budgets(weights.flatten(1), values, reference.mean(), error, 1e-6)
    off = slack.weights.view_as(weights)
    return slack._replace(shares=float(off.sum(2).mean(0).amax()) + 1e-9, weights=off)


def assert_statistics(case: Case, got: PosteriorStatistics, evidence: Tensor) -> None:
    (reference,) = references(case)
    slack = budgets_of(evidence, reference)
    assert ((got.mean[0] - reference.mean()).abs() <= slack.mean).all()
    assert ((got.variance[0] - reference.variance()).abs() <= slack.variance).all()
    assert ((got.entropy[0] - reference.entropy()).abs() <= slack.entropy).all()
    lo, hi = case.ranges[0].tolist()
    assert ((got.shares[0, lo:hi] - reference.shares()).abs() <= slack.shares).all()
    assert abs(float(got.shares.sum()) - 1) <= 1e-9
    weights = reference.log_weights().exp()
    assert_sources(got.sources[0], got.weights[0], weights, lo, slack)


def assert_products(case: Case, evidence: Tensor) -> None:
    found = moments(case)
    g = directions(case)
    x, along = on_device(case, found), g.to(found._bank.device)
    known = evidence.to(x.device)
    (reference,) = references(case)
    for product in ("vjp", "jvp"):
        mean, got = getattr(found, product)(x, along, **arguments(case), evidence=known)
        assert (mean[0].cpu() - reference.mean()).abs().max() <= 2e-6
        want = getattr(reference, product)(g[0])
        slack = 1e-4 * max(float(want.abs().max()), 0.1 * float(g.abs().max()))
        assert (got[0].cpu() - want).abs().max() <= slack


@pytest.mark.parametrize("name", WINDOWED)
def test_moments_in_triton_equal_brute_force(name: str) -> None:
    # A place of a clipped window has the sources of its class alone, and a launch of its own.
    shape = (2, 1, 1, 4) if name == "els-zeros" else (2, 1, 3, 3)
    case = random_case(NAMES[name], shape, [3])[[1]]
    case = replace(case, ranges=torch.tensor([[0, 2]]))
    evidence = evidence_of(case)
    assert_statistics(case, statistics_of(case), evidence)
    # Products are those of each cell; those of els-zeros are cells of the other paddings.
    if name != "els-zeros":
        assert_products(case, evidence)


@pytest.mark.parametrize(("window", "shape"), [(3, (2, 3, 33, 1)), (19, (2, 1, 34, 1))])
def test_moments_of_several_tiles_blocks_and_channels_equal_brute_force(
    window: int, shape: tuple[int, int, int, int]
) -> None:
    case = random_case(NAMES["local-zeros"], shape, [window], seed=2)[[0]]
    images = torch.tensor([[0, shape[0]]])
    case = replace(case, ranges=images, a=case.a * 0 + 0.6, s=case.s * 0 + 0.8)
    evidence = evidence_of(case)
    assert_statistics(case, statistics_of(case, top=2), evidence)
    assert_products(case, evidence)


def test_sources_of_many_chunks_are_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    from els_kernels.triton import plane_plan

    # Five chunks: a source that none of the two largest of their peaks reaches is not looked at.
    monkeypatch.setattr(plane_plan, "_MIN_SHIFTS", 2)
    case = random_case(NAMES["els-circular"], (1, 1, 3, 3), [3])[[1]]
    assert_statistics(case, statistics_of(case, top=2), evidence_of(case))


def test_equal_weights_are_all_listed_once_and_have_the_entropy_of_their_number() -> None:
    case = random_case(NAMES["els-circular"], (2, 1, 2, 3), [1])[[0]]
    case = replace(case, ranges=torch.tensor([[0, 2]]))
    case.bank.fill_(0.25)
    case = low_noise(case, 1e-4)
    got = statistics_of(case, top=12)
    assert (got.entropy - math.log(12)).abs().max() <= 1e-5
    assert (got.weights - 1 / 12).abs().max() <= 1e-6
    assert all(len(set(map(tuple, place))) == 12 for place in got.sources.view(6, 12, 3).tolist())


def test_moments_have_the_same_bits_alone_and_in_any_batch_and_of_a_bank_of_bytes() -> None:
    case = random_case(NAMES["local-circular"], (2, 1, 3, 3), [3], of_bytes=True)
    found, g = moments(case), directions(case)
    images = ((case.bank + 1) * 127.5).round().to(torch.uint8).to(found._bank.device)
    stored = PatchMoments(found._attention, images)
    every = everything(found, case, g)
    for other, chosen in ((found, [1]), (stored, [1, 0])):
        for got, want in zip(everything(other, case[chosen], g[chosen]), every, strict=True):
            assert torch.equal(got, want[chosen])


def everything(found: PatchMoments, case: Case, g: Tensor) -> list[Tensor]:
    x, along = on_device(case, found), g.to(found._bank.device)
    return [
        *found.statistics(x, **arguments(case), top=3),
        found.vjp(x, along, **arguments(case))[1],
        found.jvp(x, along, **arguments(case))[1],
    ]


def test_moments_of_a_query_far_from_the_bank_are_computed_in_float64() -> None:
    case = random_case(NAMES["local-zeros"], (3, 1, 4, 3), [3])[[0]]
    case = low_noise(case, 1e-3)
    case = replace(case, x=case.x + 4)
    exact = PatchMoments(operator(case.bank, "torch"), case.bank)
    want = exact.statistics(case.x, **arguments(case))
    for got, field in zip(statistics_of(case, top=8), want, strict=True):
        assert torch.equal(got, field)


def test_auto_is_triton_beside_a_triton_operator_and_whole_windows_are_left_to_torch() -> None:
    case = random_case(NAMES["els-zeros"], (2, 1, 4, 3), [3])
    found = moments(case)
    assert found.implementation(NAMES["els-zeros"]) == "triton"
    assert found.implementation(NAMES["ideal-zeros"]) == "torch"
    assert found.evidence_channels(NAMES["els-zeros"]) == 3
    exact = PatchMoments(found._attention, found._bank, implementation="torch")
    assert exact.implementation(NAMES["els-zeros"]) == "torch"


def test_triton_moments_need_a_triton_operator() -> None:
    bank: Any = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="triton needs a triton operator, got torch"):
        PatchMoments(PatchAttention(bank, implementation="torch"), bank, implementation="triton")
