"""Queries far from the bank: 50 and 500 of its standard deviations, down to s = 1e-4.

Images of the bank differ by a level in pairs of pixels here, so that most of a logit is common to
all of them and only its smallest part tells which is the nearest.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.kernels.cases import NAMES, Case, operator, random_bank, relative_errors
from tests.kernels.fold_cases import FOLD_NAMES, FoldCase
from tests.support.rows import latin

from els_kernels import FoldedAttention, FoldedMoments, PatchMoments
from els_kernels.blocked_moments import BlockedQuery
from els_kernels.native import far_queries

FAR = [20.0, 200.0]
"""50 and 500 standard deviations of ``random_bank``."""
LEVELS = [1.0, 0.05, 1e-2, 1e-4]
NATIVE = "native-baseline"
"""One instruction set for all: the choice of far queries does not depend on it."""


def far_case(name: str, seed: int = 0) -> Case:
    """Return a query for each distance and level, the first of them near the bank."""
    geometry, shape = NAMES.get(name) or FOLD_NAMES[name], (4, 2, 6, 6)
    bank = random_bank(shape, seed, of_bytes=True).clamp(-0.9, 0.9)
    # A level up and a level down: every window of three columns has the sum that it had.
    step = torch.tensor([1.0, -1.0, 0.0]).repeat(2) / 127.5
    bank[1], bank[2] = bank[0] + step, bank[0] + step.roll(1)
    bank = ((bank + 1) * 127.5).round() / 127.5 - 1
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([0.0] + [size for size in FAR for _ in LEVELS])
    s = torch.tensor([1e-4] + LEVELS * len(FAR), dtype=torch.float64)
    a = (1 - s.square()).clamp(min=1e-4).sqrt()
    noise = torch.randn(len(s), *shape[1:], generator=generator, dtype=torch.float64)
    scale = (slice(None), None, None, None)
    # Nearly halfway between two of them.
    clean = 0.55 * bank[0].double() + 0.45 * bank[1]
    x = a[scale] * clean + s[scale] * noise + sizes[scale]
    window = None if geometry.whole else torch.full((len(s),), 3)
    return Case(geometry, bank, x.float(), a, s, window, torch.tensor([[0, 4]] * len(s)))


def ask(
    case: Case, moments: PatchMoments | FoldedMoments, **more: torch.Tensor
) -> list[torch.Tensor]:
    options: dict[str, Any] = {
        "a": case.a, "s": case.s, "window": case.window,
        "ranges": case.ranges, "geometry": case.geometry, **more,
    }  # fmt: skip
    along = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(5))
    found = moments.statistics(case.x, **options, top=2)
    products = [f(case.x, along, **options)[1] for f in (moments.vjp, moments.jvp)]
    return [found.mean, found.variance, found.entropy, found.weights, *products]


@pytest.mark.parametrize("name", NAMES)
def test_a_far_query_has_the_mean_of_its_nearest_patches(name: str) -> None:
    case = far_case(name)
    got, want = case.attend(NATIVE), case.attend("reference")
    assert (relative_errors(got.mean, want.mean) <= 1e-4).all()


@pytest.mark.parametrize("name", [name for name in NAMES if not NAMES[name].whole])
def test_a_far_query_has_the_statistics_and_products_of_its_nearest_patches(name: str) -> None:
    case = far_case(name)[[0, 2, 4, 8]]
    forms = [
        PatchMoments(operator(case.bank, NATIVE), case.bank, implementation=form)
        for form in ("native", "torch")
    ]
    got, want = (ask(case, form) for form in forms)
    for ours, exactly in zip(got, want, strict=True):
        for one, other in zip(ours[1:], exactly[1:], strict=True):
            assert (one - other).abs().max() <= 1e-4 * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("name", FOLD_NAMES)
def test_a_far_query_has_the_fold_of_its_nearest_patches(name: str) -> None:
    case = far_case(name)[[0, 2, 4, 8]]
    assert case.window is not None
    for rho in (0.2, math.inf):
        fold = torch.full((len(case),), rho)
        asked = FoldCase(case.geometry, case.bank, case.x, case.s, case.window, fold)
        got, want = asked.attend(NATIVE), asked.reference()
        assert (relative_errors(got.mean, want.mean) <= 1e-4).all()


@latin(2, "name")
@pytest.mark.parametrize("name", FOLD_NAMES)
def test_a_far_query_has_the_moments_of_the_fold_of_its_nearest_patches(name: str) -> None:
    case = far_case(name)[[0, 2, 4, 8]]
    attention = FoldedAttention(case.bank, implementation="native")
    fold = torch.full((len(case),), 0.2)
    got, want = (
        ask(case, FoldedMoments(attention, implementation=form), fold=fold)
        for form in ("native", "torch")
    )
    for ours, exactly in zip(got, want, strict=True):
        for one, other in zip(ours, exactly, strict=True):
            assert (one - other).abs().max() <= 1e-4 * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("name", ["els-circular", "els-zeros", "ideal-zeros"])
@pytest.mark.slow
def test_a_far_query_has_the_same_bits_alone_and_in_any_batch(name: str) -> None:
    case = far_case(name)
    attention = operator(case.bank, NATIVE)
    moments = PatchMoments(attention, case.bank)
    together, statistics = case.ask(attention), ask(case, moments)
    for b in (0, 8):
        alone = case[[b]]
        assert torch.equal(alone.ask(attention).mean[0], together.mean[b])
        for one, all_ in zip(ask(alone, moments)[:4], statistics[:4], strict=True):
            assert torch.equal(one[0], all_[b])


def test_evidence_of_far_and_near_queries_has_one_shape_and_spares_a_pass() -> None:
    case = far_case("els-circular")
    moments = PatchMoments(operator(case.bank, NATIVE), case.bank)
    options: dict[str, Any] = {"a": case.a, "s": case.s, "window": case.window}
    options["geometry"] = case.geometry
    evidence = moments.evidence(case.x, **options)
    again = moments.vjp(case.x, case.x, **options, evidence=evidence)
    for got, want in zip(again, moments.vjp(case.x, case.x, **options), strict=True):
        assert torch.equal(got, want)


def test_only_far_queries_with_coarse_logits_leave_the_native_form() -> None:
    case = far_case("els-circular")
    moments = PatchMoments(operator(case.bank, NATIVE), case.bank)
    queries = moments._queries(case.x, case.a, case.s, case.window, case.ranges, case.geometry)
    far = [isinstance(query, BlockedQuery) for query in queries]
    # Near at s = 1e-4, then each distance at falling levels.
    assert far == [False, False, True, True, True, False, True, True, True]
    assert not far_queries.is_far(query=2.0, key=1.0, a=1.0, s=1e-4)


def test_a_bank_of_bytes_is_unpacked_exactly() -> None:
    bank = random_bank((21, 2, 4, 3), of_bytes=True)
    bank = ((bank + 1) * 127.5).round().div(127.5).sub(1)
    native: Any = operator(bank, NATIVE).prepared
    assert torch.equal(native.images(3, 20).float(), bank[3:20])
