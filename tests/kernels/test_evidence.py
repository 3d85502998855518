"""Products from the evidence of an earlier call: same bits, one pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.kernels.cases import Case, random_case
from tests.kernels.moment_cases import arguments, directions, windows_of

from els_kernels import Geometry, PatchAttention, PatchMoments

SHAPE = (5, 2, 5, 4)


@pytest.fixture(params=["torch", "auto"])
def operator(request: pytest.FixtureRequest, geometry: Geometry) -> tuple[Case, PatchMoments]:
    case = random_case(geometry, SHAPE, windows_of(geometry, SHAPE))
    return case, PatchMoments(PatchAttention(case.bank, implementation=request.param), case.bank)


def test_products_from_evidence_have_the_same_bits(operator: tuple[Case, PatchMoments]) -> None:
    case, moments = operator
    g = directions(case)
    evidence = moments.evidence(case.x, **arguments(case))
    assert evidence.dtype == torch.float64
    assert (len(evidence), *evidence.shape[2:]) == (len(case), *case.x.shape[2:])
    for multiply in (moments.vjp, moments.jvp):
        want = multiply(case.x, g, **arguments(case))
        got = multiply(case.x, g, **arguments(case), evidence=evidence)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


def test_evidence_of_an_image_has_the_same_bits_alone(
    operator: tuple[Case, PatchMoments],
) -> None:
    case, moments = operator
    together = moments.evidence(case.x, **arguments(case))
    for b in range(len(case)):
        one = case[[b]]
        assert torch.equal(moments.evidence(one.x, **arguments(one))[0], together[b])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e[:, :-1], "evidence: expected torch.float64 "),
        (lambda e: e[:1], "evidence: expected torch.float64 "),
        (lambda e: e.float(), "evidence: expected torch.float64 "),
        (lambda e: e * torch.nan, "evidence: expected finite numbers"),
    ],
)
def test_evidence_of_another_kind_is_rejected(
    operator: tuple[Case, PatchMoments], change: Any, message: str
) -> None:
    case, moments = operator
    wrong = change(moments.evidence(case.x, **arguments(case)))
    for multiply in (moments.vjp, moments.jvp):
        with pytest.raises(ValueError, match=message):
            multiply(case.x, case.x, **arguments(case), evidence=wrong)
