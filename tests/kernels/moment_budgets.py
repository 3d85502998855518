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
    """Return the largest effect of errors of logits and sums, to any order of the former.

    If no logit is wrong by more than δ, a weight is between w/R and w·R, R = e^(2δ), and as weights
    add up to one, at least 1 − R·(what the others have).
    """
    one = case[[b]]
    (query,) = moments._queries(one.x, one.a, one.s, one.window, one.ranges, one.geometry)
    weights = reference.log_weights().exp()
    if not isinstance(query, NativeQuery):
        # Float64: logits of size 1e8 round at 1e-8, and with them weights and entropy.
        slack = 1e-7 if case.s[b] <= 1e-4 else 1e-9
        even = torch.full_like(reference.mean(), 1e-7 + slack)
        return Budgets(even, even, even[0] + 1e-6, slack, torch.full_like(weights, 1e-7))
    # A bound too large to be of use is as good as none.
    ratio = math.exp(min(2 * query.units.error * math.log(2), 300.0))
    flat = weights.flatten(1)
    others = flat.sum(1, keepdim=True) - flat
    low = torch.maximum(flat / ratio, 1 - ratio * others)
    high = torch.minimum(flat * ratio, torch.ones_like(flat))
    off = torch.maximum(high - flat, flat - low) + _ROUNDING * flat
    values = reference.bank.double().flatten(2).movedim(1, 0).flatten(1)
    mean, spread, surprise = [], [], []
    for place, centre in enumerate(reference.mean().flatten(1).T):
        gaps = (values - centre[:, None]).abs()
        mean.append(gaps @ off[place] + _ROUNDING)
        spread.append(gaps.square() @ off[place] + mean[-1].square() + _ROUNDING)
        ends = torch.stack([low[place], high[place]])
        change = (_surprise(ends) - _surprise(flat[place])).abs().amax(0)
        # Its maximum may be between the ends.
        change[(low[place] < 1 / math.e) & (high[place] > 1 / math.e)] = 1 / math.e
        surprise.append(change.sum() + _ROUNDING * (1 + _surprise(flat[place]).sum()))
    return Budgets(
        torch.stack(mean, 1).view_as(reference.mean()),
        torch.stack(spread, 1).view_as(reference.mean()),
        torch.stack(surprise).view(reference.x.shape[1:]),
        float(off.view_as(weights).sum(2).mean(0).amax()) + 1e-9,
        off.view_as(weights) + 1e-12,
    )


def _surprise(weights: Tensor) -> Tensor:
    """Return −w log w."""
    return -weights * weights.clamp(min=1e-300).log()
