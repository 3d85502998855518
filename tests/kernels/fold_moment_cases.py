"""Cases of moments of a fold, their references, and how far answers may lie from these."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from tests.kernels.cases import random_bank
from tests.kernels.fold_cases import FOLD_NAMES, FoldCase, fold_case
from tests.kernels.known import KnownFoldPosterior
from tests.kernels.moment_budgets import Budgets, posterior_budgets
from torch import Tensor

from els_kernels import (
    FOLD_MOMENT_IMPLEMENTATIONS,
    FoldedMoments,
    PosteriorStatistics,
)
from els_kernels.native import NativeFoldMoments
from els_kernels.native.fold_moments_binding import NativeFoldQuery
from els_kernels.reference_fold_statistics import ReferenceFoldPosterior

PAIRS = [(0.5, 0.1), (0.3, math.inf), (0.05, 0.5), (1e-4, 0.5), (0.2, 0.0)]
"""(s, ρ)."""
TOP = 5
UNEQUAL = [(5, 7), (8, 6), (8, 6)]
ROUNDING = 3e-6
"""Relative error of the native sums: of a logit of 20 bits, of 2^z, and of 2k taps, in float32."""
LEAST = 1e-8
"""Weight from which the native form lists a source: it skips 2^-26 of a patch's weights."""


def banks(name: str) -> list[tuple[tuple[int, int], list[Tensor], int]]:
    """Return sizes of queries, banks and windows: equal sizes, clipped patches, unequal sizes."""
    found = [((6, 5), list(random_bank((2, 2, 6, 5))), 3)]
    if name == "local-zeros":
        found.append(((4, 5), list(random_bank((2, 1, 4, 5))), 9))
    if name.startswith("els"):
        found.append(
            ((7, 6), [random_bank((1, 2, *size), i)[0] for i, size in enumerate(UNEQUAL)], 5)
        )
    return found


def cases(name: str) -> list[FoldCase]:
    return [
        fold_case(FOLD_NAMES[name], size, bank, window, PAIRS) for size, bank, window in banks(name)
    ]


def moments(case: FoldCase, form: str = "torch") -> FoldedMoments:
    kind, _, instruction_set = form.partition("-")
    with pytest.MonkeyPatch.context() as patch:
        if kind == "native":
            made = partial(NativeFoldMoments, instruction_set=instruction_set)
            patch.setitem(FOLD_MOMENT_IMPLEMENTATIONS, "native", made)
        return FoldedMoments(case.operator("torch"), implementation=kind)


def budgets(
    operator: FoldedMoments, case: FoldCase, b: int, reference: ReferenceFoldPosterior
) -> Budgets:
    """Return the budgets of one image: float64, or as far as logits may be wrong."""
    weights, mean = torch.cat(reference.weights(), 1), reference.mean()
    implementation = operator._moments
    values = torch.cat([image.double().flatten(1) for image in reference.bank], 1)
    if operator.implementation == "triton":
        # A logit is wrong by 2^-21 of itself at most: its terms are split into two of 11 bits, and
        # added to float32 a few times. Those 64 bits below the largest have no weight.
        logits, _ = reference._logits(reference.x.double())
        largest = float(logits.amax(1).abs().max()) * math.log2(math.e)
        return posterior_budgets(weights, values, mean, 2.0**-21 * (largest + 64), ROUNDING)
    if not isinstance(implementation, NativeFoldMoments):
        # A logit of size 1e8 rounds at 1e-8, and with it the weights.
        even = torch.full_like(mean, 1e-7)
        return Budgets(even, even, even[0] + 1e-6, 1e-7, torch.full_like(weights, 1e-7))
    (query,) = operator.attention.validate(case[[b]].x, **arguments(case[[b]]))
    error = NativeFoldQuery(implementation, query).crop.units.error
    return posterior_budgets(weights, values, mean, error, ROUNDING)


def assert_statistics(
    got: PosteriorStatistics, b: int, reference: ReferenceFoldPosterior, lo: int, slack: Budgets
) -> None:
    """Assert the statistics of one image whose range starts at bank image ``lo``."""
    hi = lo + len(reference.bank)
    assert ((got.mean[b] - reference.mean()).abs() <= slack.mean).all()
    assert ((got.variance[b] - reference.variance()).abs() <= slack.variance).all()
    assert ((got.entropy[b] - reference.entropy()).abs() <= slack.entropy).all()
    assert (got.shares[b, lo:hi] - reference.shares()).abs().max() <= slack.shares
    assert abs(float(got.shares[b].sum()) - 1) <= 1e-9
    every = torch.cat(reference.weights(), 1)
    given = got.weights[b].flatten(0, 1)
    largest = every.sort(descending=True).values[:, : given.shape[1]]
    within = slack.weights.amax(1)[:, None]
    assert ((given[:, : largest.shape[1]] - largest).abs() <= within).all()
    assert (given.diff(dim=1) <= 0).all()
    width = torch.tensor([image.shape[2] for image in reference.bank])
    sizes = torch.tensor([image[0].numel() for image in reference.bank])
    starts = sizes.cumsum(0) - sizes
    sources = got.sources[b].flatten(0, 1)
    listed = sources[..., 0] >= 0
    assert (listed.sum(1) >= (largest > LEAST).sum(1)).all()
    image = (sources[..., 0] - lo).clamp(min=0)
    place = starts[image] + sources[..., 1] * width[image] + sources[..., 2]
    place = place.masked_fill(~listed, -1)
    for row in place.tolist():
        kept = [source for source in row if source >= 0]
        assert len(set(kept)) == len(kept)
    at = place.clamp(min=0)
    gaps = (given - every.gather(1, at)).abs().masked_fill(~listed, 0)
    assert (gaps <= slack.weights.gather(1, at) + 1e-5 * given).all()
    assert (given[~listed] == 0).all()


def assert_product(got: Tensor, want: Tensor, direction: Tensor) -> None:
    """Assert 1e-4 of a Jacobian product, or of a tenth of what it would be if D were x."""
    size = max(float(want.abs().max()), 0.1 * float(direction.abs().max()))
    assert (got - want).abs().max() <= 1e-4 * size


def arguments(case: FoldCase) -> dict[str, Any]:
    return {
        "a": case.a,
        "s": case.s,
        "window": case.window,
        "fold": case.fold,
        "ranges": case.ranges,
        "geometry": case.geometry,
    }


def references(case: FoldCase) -> list[KnownFoldPosterior]:
    limits = [(0, len(case.bank))] * len(case.x) if case.ranges is None else case.ranges.tolist()
    return [
        KnownFoldPosterior(
            case.x[b],
            list(case.bank)[lo:hi],
            float(case.a[b]),
            float(case.s[b]),
            int(case.window[b]),
            float(case.fold[b]),
            case.geometry,
        )
        for b, (lo, hi) in enumerate(limits)
    ]


def directions(case: FoldCase, seed: int = 3) -> Tensor:
    return torch.randn(case.x.shape, generator=torch.Generator().manual_seed(seed))


def everything(case: FoldCase, g: Tensor | None = None, form: str = "torch") -> list[Tensor]:
    operator, along = moments(case, form), directions(case) if g is None else g
    return [
        *operator.statistics(case.x, **arguments(case), top=TOP),
        operator.vjp(case.x, along, **arguments(case))[1],
        operator.jvp(case.x, along, **arguments(case))[1],
    ]
