"""What theory says of the machines, whatever computes them."""

from dataclasses import replace

import pytest
import torch
from tests.kernels.cases import (
    NAMES,
    Case,
    assert_within_budget,
    evidence_budgets,
    few,
    for_interpreter,
    random_case,
    relative_errors,
)
from tests.support.rows import latin, telling

from els_kernels import Posterior

Shape = tuple[int, int, int, int]
INTERPRETED = ("els-circular", "local-zeros", "equivariant-circular")
"""Machines of three kernels, which alone are interpreted at every run in Triton."""
few_interpreted = telling(
    lambda any_implementation, name: any_implementation != "triton" or name in INTERPRETED
)


def with_geometry(case: Case, name: str, window: int | None = None) -> Case:
    """The same queries for another machine."""
    windows = None if window is None else torch.full((len(case),), window)
    return replace(case, geometry=NAMES[name], window=windows)


@latin(3, "any_implementation", "shape")
@pytest.mark.parametrize("shape", [(5, 1, 4, 5), (4, 3, 5, 3), (3, 1, 1, 4)], ids=str)
def test_with_zero_padding_windows_as_large_as_the_image_make_els_local(
    any_implementation: str, shape: Shape
) -> None:
    side = max(shape[2:])
    for window in range(side + 1 - side % 2, 2 * side, 2):
        els = random_case(NAMES["els-zeros"], shape, [window] * few(any_implementation, 4))
        local = with_geometry(els, "local-zeros", window)
        assert_within_budget(els, els.attend(any_implementation), local.attend(any_implementation))


@latin(3, "any_implementation", "machine", "shape")
@pytest.mark.parametrize("shape", [(5, 1, 4, 5), (4, 3, 5, 3), (3, 1, 1, 4)], ids=str)
@pytest.mark.parametrize("machine", ["els-zeros", "local-zeros"])
def test_with_zero_padding_the_largest_window_makes_the_ideal_machine(
    any_implementation: str, machine: str, shape: Shape
) -> None:
    windows = [2 * max(shape[2:]) - 1] * few(any_implementation, 4)
    case = random_case(NAMES[machine], shape, windows)
    ideal = with_geometry(case, "ideal-zeros")
    assert_within_budget(case, case.attend(any_implementation), ideal.attend(any_implementation))


@pytest.mark.parametrize("side", [1, 3, 5])
def test_on_a_square_torus_a_window_of_its_side_makes_els_equivariant(
    any_implementation: str, side: int
) -> None:
    windows = [side] * few(any_implementation, 4)
    els = random_case(NAMES["els-circular"], (4, 2, side, side), windows)
    whole = with_geometry(els, "equivariant-circular")
    assert_within_budget(els, els.attend(any_implementation), whole.attend(any_implementation))


@latin(2, "any_implementation", "name", "shift")
@pytest.mark.parametrize("name", ["equivariant-circular", "els-circular"])
@pytest.mark.parametrize("shift", [(1, 0), (0, 2), (3, 4), (-1, 1)], ids=str)
def test_a_query_rolled_on_the_torus_rolls_the_answer(
    any_implementation: str, name: str, shift: tuple[int, int]
) -> None:
    case = for_interpreter(any_implementation, random_case(NAMES[name], (4, 2, 4, 5)))
    rolled = replace(case, x=case.x.roll(shift, (2, 3)))
    mean, evidence = case.attend(any_implementation)
    want = Posterior(mean.roll(shift, (2, 3)), evidence.roll(shift, (1, 2)))
    assert_within_budget(rolled, rolled.attend(any_implementation), want)


def test_the_ideal_machine_of_one_image_returns_that_image(any_implementation: str) -> None:
    case = random_case(NAMES["ideal-zeros"], (1, 3, 4, 5))
    # One weight, exactly 1; the image is centred and moved back, an ulp of 1 each way.
    torch.testing.assert_close(
        case.attend(any_implementation).mean, case.bank.expand_as(case.x), rtol=0, atol=2.5e-7
    )


@few_interpreted
@pytest.mark.parametrize("name", NAMES)
def test_preserving_and_exploding_variance_are_one_problem(
    any_implementation: str, name: str
) -> None:
    preserving = for_interpreter(any_implementation, random_case(NAMES[name], (5, 2, 4, 5)))
    a = preserving.a
    exploding = replace(
        preserving,
        x=(preserving.x / a[:, None, None, None]).float(),
        a=torch.ones_like(a),
        s=preserving.s / a,
    )
    got, want = exploding.attend(any_implementation), preserving.attend(any_implementation)
    # x/√ᾱ is rounded anew, which moves a logit as much as the rounding of its products does.
    assert_within_budget(exploding, got, want)


@few_interpreted
@pytest.mark.parametrize("name", NAMES)
def test_a_bank_given_twice_answers_as_given_once_with_log_2_more_evidence(
    any_implementation: str, name: str
) -> None:
    once = for_interpreter(any_implementation, random_case(NAMES[name], (4, 1, 3, 4)))
    once = replace(once, ranges=torch.tensor([[0, 4]] * len(once)))
    twice = replace(once, bank=once.bank.repeat(2, 1, 1, 1), ranges=2 * once.ranges)
    mean, evidence = once.attend(any_implementation)
    want = Posterior(mean, evidence + torch.log(torch.tensor(2.0)))
    assert_within_budget(once, twice.attend(any_implementation), want)


@few_interpreted
@latin(2, "any_implementation", "name", "shards")
@pytest.mark.parametrize("shards", ["banks", "ranges"])
@pytest.mark.parametrize("name", NAMES)
def test_shards_of_a_bank_merge_by_their_evidence_to_the_answer_of_the_whole(
    any_implementation: str, name: str, shards: str
) -> None:
    images = few(any_implementation, 37)
    whole = random_case(NAMES[name], (images, 2, 5, 6), None if NAMES[name].whole else [3])
    whole = for_interpreter(any_implementation, whole)
    whole = replace(whole, ranges=torch.tensor([(0, images)] * len(whole)))
    want = whole.attend(any_implementation)
    parts = [
        replace(whole, ranges=torch.tensor([(lo, hi)] * len(whole)))
        if shards == "ranges"
        else replace(whole, bank=whole.bank[lo:hi], ranges=whole.ranges.clamp(max=hi - lo))
        for lo, hi in [(0, 1), (1, images // 2), (images // 2, images)]
    ]
    means, evidences = zip(*(part.attend(any_implementation) for part in parts), strict=True)
    logs = torch.stack(evidences).double()
    total = logs.logsumexp(0)
    mean = ((logs - total).exp()[:, :, None] * torch.stack(means).double()).sum(0)
    # 1e-6, and what a float32 evidence loses by its size: its last bit moves the shards' weights.
    slack = 1e-6 + evidence_budgets(whole, total)
    assert (relative_errors(mean, want.mean) <= slack).all()
    assert ((total - want.log_evidence).abs().flatten(1).amax(1) <= slack).all()


def test_the_score_is_the_gradient_of_the_log_evidence_of_the_ideal_machine() -> None:
    case = random_case(NAMES["ideal-zeros"], (4, 1, 3, 3))[[0]]
    case = replace(case, a=torch.tensor([0.8]), s=torch.tensor([0.6]))
    score = case.score(case.attend("reference").mean).flatten().double()
    # Richardson: error h⁴/30·f⁽⁵⁾ of about 1e-6, and eps32 of an evidence near 10 over h, 2e-5.
    h = 2.0**-5
    directions = torch.eye(9).view(9, 1, 3, 3)
    steps = torch.cat([case.x + m * h * directions for m in (1, -1, 2, -2)])
    moved = replace(
        case,
        x=steps,
        a=case.a.repeat(36),
        s=case.s.repeat(36),
        ranges=case.ranges.repeat(36, 1),
    )
    evidence = moved.attend("reference").log_evidence[:, 0, 0].double().view(4, 9)
    gradient = (8 * (evidence[0] - evidence[1]) - (evidence[2] - evidence[3])) / (12 * h)
    assert (gradient - score).norm() <= 1e-4 * score.norm()
