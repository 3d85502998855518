"""Cases of the kernels by displacement: the fold, posterior moments, and moments of a fold."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from tests.kernels.cases import NAMES, random_bank, random_case, relative_errors
from tests.kernels.fold_cases import FOLD_NAMES, MEAN_BUDGET, fold_case, fold_evidence_budgets
from tests.kernels.fold_moment_cases import directions as fold_directions
from tests.kernels.fold_moment_cases import references as fold_references
from tests.kernels.moment_cases import directions, references
from tests.kernels.ptx.driver import InterpretingDriver, interpreting

from els_kernels.fold_plan import FoldQuery
from els_kernels.triton import fold, fold_moments, moments


class Outcome(NamedTuple):
    """Result of a launch on a compiled kernel."""

    faults: str
    """Faults that a GPU would make; empty for none."""
    new: int
    """Binaries that the warm-up did not launch."""
    errors: list[float]
    """Largest errors, as multiples of their budgets."""


def _warm_and_cold(operator: Any, geometry: Any, ask: Any) -> tuple[Any, str, int]:
    """Return an answer, the faults, and the number of binaries that the warm-up did not launch."""
    warm, device = InterpretingDriver("sm90", dry=True), InterpretingDriver("sm90", "hopper")
    with interpreting(warm, "sm90"):
        prepared = operator()
        prepared.warm_up([3], geometry)
    with interpreting(device, "sm90"):
        answer = ask(prepared)
    known = {launch.hash for launch in warm.launches}
    return answer, str(device.faults), len({one.hash for one in device.launches} - known)


def fold_outcome() -> Outcome:
    """Return that of the fold."""
    vars(fold)["architecture"] = lambda _: "sm90"
    bank = random_bank((1, 1, 3, 3))
    case = fold_case(FOLD_NAMES["els-circular"], (3, 3), bank, 3, [(0.3, 0.5)])
    query = FoldQuery(case.x[0], float(case.a), float(case.s), 3, (0, 1), 0.5, case.geometry)
    (mean, evidence), faults, new = _warm_and_cold(
        lambda: fold.TritonFold([bank]), case.geometry, lambda prepared: prepared(query)
    )
    want = case.reference()
    budget = float(fold_evidence_budgets(case, want.log_evidence))
    errors = [
        float(relative_errors(mean[None], want.mean)) / MEAN_BUDGET,
        float((evidence - want.log_evidence).abs().max()) / budget,
    ]
    return Outcome(faults, new, errors)


def moments_outcome() -> Outcome:
    """Return that of posterior moments."""
    vars(moments)["architecture"] = lambda _: "sm90"
    case = random_case(NAMES["local-zeros"], (2, 3, 3, 4), [3])[[1]]
    limits = int(case.ranges[0, 0]), int(case.ranges[0, 1])
    g = directions(case)[0]

    def ask(prepared: Any) -> list[torch.Tensor]:
        query = prepared.query(case.x[0], float(case.a), float(case.s), 3, limits, case.geometry)
        statistics = query.statistics(2, 2, True)
        query.known = query.evidence()
        return [*statistics[:3], query.vjp(g.double())[1], query.jvp(g.double())[1]]

    answers, faults, new = _warm_and_cold(
        lambda: moments.TritonMoments(case.bank), case.geometry, ask
    )
    (reference,) = references(case)
    wanted = [
        reference.mean(), reference.variance(), reference.entropy(),
        reference.vjp(g), reference.jvp(g),
    ]  # fmt: skip
    return Outcome(faults, new, _relative_to_budgets(answers, wanted))


def fold_moments_outcome() -> Outcome:
    """Return that of the moments of a fold."""
    vars(fold_moments)["architecture"] = lambda _: "sm90"
    bank = random_bank((2, 1, 3, 3))
    case = fold_case(FOLD_NAMES["local-zeros"], (3, 3), bank, 3, [(0.5, 0.5)])
    query = FoldQuery(case.x[0], float(case.a), float(case.s), 3, (0, 2), 0.5, case.geometry)
    g = fold_directions(case)[0]

    def ask(prepared: Any) -> list[torch.Tensor]:
        statistics = prepared.statistics(query, 2, True)
        return [*statistics[:3], prepared.vjp(query, g)[1], prepared.jvp(query, g)[1]]

    answers, faults, new = _warm_and_cold(
        lambda: fold_moments.TritonFoldMoments([bank]), case.geometry, ask
    )
    (reference,) = fold_references(case)
    wanted = [
        reference.mean(), reference.variance(), reference.entropy(),
        reference.vjp(g), reference.jvp(g),
    ]  # fmt: skip
    return Outcome(faults, new, _relative_to_budgets(answers, wanted))


def _relative_to_budgets(answers: list[torch.Tensor], wanted: list[torch.Tensor]) -> list[float]:
    return [
        float((got - want).abs().max()) / (1e-4 * max(float(want.abs().max()), 0.1))
        for got, want in zip(answers, wanted, strict=True)
    ]


PLANES = {
    "fold": fold_outcome,
    "moments": moments_outcome,
    "moments of a fold": fold_moments_outcome,
}
"""Cases by name."""
