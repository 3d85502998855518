"""How far statistics of a posterior may lie from the specification."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from tests.kernels.cases import Case
from torch import Tensor

from els_kernels import PatchMoments
from els_kernels.native.moments_binding import NativeQuery
from els_kernels.reference_statistics import ReferencePosterior

_ROUNDING = 1e-6
"""Relative error of sums of float32 weights, whose own is 2e-7: a few terms of a tile and lane."""


class Budgets(NamedTuple):
    """Largest errors of one image."""

    mean: Tensor
    """[C, H, W]."""
    variance: Tensor
    """[C, H, W]."""
    entropy: Tensor
    """[H, W]."""
    shares: float
    weights: Tensor
    """[HW, N, HW], of every source."""


def budgets(moments: PatchMoments, case: Case, b: int, reference: ReferencePosterior) -> Budgets:
    """Return the budgets of one image: float64, or as far as logits may be wrong."""
    one = case[[b]]
    (query,) = moments._queries(one.x, one.a, one.s, one.window, one.ranges, one.geometry)
    weights = reference.log_weights().exp()
    if not isinstance(query, NativeQuery):
        # Float64: logits of size 1e8 round at 1e-8, and with them weights and entropy.
        slack = 1e-7 if case.s[b] <= 1e-4 else 1e-9
        even = torch.full_like(reference.mean(), 1e-7 + slack)
        return Budgets(even, even, even[0] + 1e-6, slack, torch.full_like(weights, 1e-7))
    values = reference.bank.double().flatten(2).movedim(1, 0).flatten(1)
    found = posterior_budgets(
        weights.flatten(1), values, reference.mean(), query.units.error, _ROUNDING
    )
    off = found.weights.view_as(weights)
    return found._replace(shares=float(off.sum(2).mean(0).amax()) + 1e-9, weights=off)


def posterior_budgets(
    weights: Tensor, values: Tensor, mean: Tensor, error: float, rounding: float
) -> Budgets:
    """Return the largest effect of errors of logits and sums, to any order of the former.

    If no logit is wrong by more than δ, a weight is between w/R and w·R, R = e^(2δ), and as weights
    add up to one, at least 1 − R·(what the others have). The budget of shares bounds all together.

    Args:
        weights: [HW, S], of every source.
        values: [C, S].
        mean: [C, H, W].
        error: bits that a logit may be wrong by.
        rounding: relative error of sums of weights.
    """
    # A bound too large to be of use is as good as none.
    ratio = math.exp(min(2 * error * math.log(2), 300.0))
    others = weights.sum(1, keepdim=True) - weights
    low = torch.maximum(weights / ratio, 1 - ratio * others)
    high = torch.minimum(weights * ratio, torch.ones_like(weights))
    off = torch.maximum(high - weights, weights - low) + rounding * weights
    means, spread, surprise = [], [], []
    for place, centre in enumerate(mean.flatten(1).T):
        gaps = (values - centre[:, None]).abs()
        means.append(gaps @ off[place] + rounding)
        spread.append(gaps.square() @ off[place] + means[-1].square() + rounding)
        ends = torch.stack([low[place], high[place]])
        change = (_surprise(ends) - _surprise(weights[place])).abs().amax(0)
        # Its maximum may be between the ends.
        change[(low[place] < 1 / math.e) & (high[place] > 1 / math.e)] = 1 / math.e
        surprise.append(change.sum() + rounding * (1 + _surprise(weights[place]).sum()))
    return Budgets(
        torch.stack(means, 1).view_as(mean),
        torch.stack(spread, 1).view_as(mean),
        torch.stack(surprise).view(mean.shape[1:]),
        float(off.sum(1).mean()) + 1e-9,
        off + 1e-12,
    )


def _surprise(weights: Tensor) -> Tensor:
    """Return −w log w."""
    return -weights * weights.clamp(min=1e-300).log()
