"""The compiled kernels by displacement, interpreted: the fold and the moments of small cases."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch
from tests.support.preloaded import FORKS

# The project has to work without triton.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("triton") is None,
        reason="triton is not installed: pip install 'els-denoise[gpu]'",
    ),
]


class Outcome(NamedTuple):
    """Result of a launch on a compiled kernel."""

    faults: str
    """Faults that a GPU would make; empty for none."""
    new: int
    """Binaries that the warm-up did not launch."""
    errors: list[float]
    """Largest errors, as multiples of their budgets."""


@pytest.fixture(scope="module")
def compiler() -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton compiles; in this one it interprets the source."""
    with ProcessPoolExecutor(1, mp_context=FORKS, initializer=_compile_for_real) as pool:
        yield pool


def _compile_for_real() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def _warm_and_cold(operator: Any, geometry: Any, ask: Any) -> tuple[Any, str, int]:
    """Return an answer, the faults, and the number of binaries that the warm-up did not launch."""
    from tests.kernels.ptx.driver import InterpretingDriver, interpreting

    warm, device = InterpretingDriver("sm90", dry=True), InterpretingDriver("sm90", "hopper")
    with interpreting(warm, "sm90"):
        prepared = operator()
        prepared.warm_up([3], geometry)
    with interpreting(device, "sm90"):
        answer = ask(prepared)
    known = {launch.hash for launch in warm.launches}
    return answer, str(device.faults), len({one.hash for one in device.launches} - known)


def fold_outcome() -> Outcome:
    from tests.kernels.cases import random_bank, relative_errors
    from tests.kernels.fold_cases import FOLD_NAMES, MEAN_BUDGET, fold_case, fold_evidence_budgets

    from els_kernels.fold_plan import FoldQuery
    from els_kernels.triton import fold

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
    from tests.kernels.cases import NAMES, random_case
    from tests.kernels.moment_cases import directions, references

    from els_kernels.triton import moments

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
    errors = [
        float((got - want).abs().max()) / (1e-4 * max(float(want.abs().max()), 0.1))
        for got, want in zip(answers, wanted, strict=True)
    ]
    return Outcome(faults, new, errors)


@pytest.mark.parametrize("outcome", [fold_outcome, moments_outcome])
def test_planes_are_right_in_bounds_free_of_races_and_compiled_by_the_warm_up(
    compiler: ProcessPoolExecutor, outcome: Any
) -> None:
    found = compiler.submit(outcome).result()
    assert found.faults == ""
    assert found.new == 0
    assert max(found.errors) <= 1
