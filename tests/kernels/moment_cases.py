"""Cases of moments of patch attention, and their references."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from tests.kernels.cases import VARIANTS, Case, operator
from tests.kernels.known import KnownPosterior
from torch import Tensor

from els_kernels import (
    Geometry,
    PatchMoments,
    max_window,
)

SHAPES = [(5, 2, 5, 4), (4, 1, 3, 5)]


def windows_of(geometry: Geometry, shape: tuple[int, ...]) -> list[int] | None:
    if geometry.whole:
        return None
    return sorted({1, 3, max_window(geometry, *shape[2:])})


FORMS = ["torch", *(name for name in VARIANTS if name.startswith("native"))]
"""Implementations of moments; the native ones leave whole windows to torch."""


def moments(case: Case, form: str = "torch") -> PatchMoments:
    return PatchMoments(operator(case.bank, form), case.bank)


def arguments(case: Case) -> dict[str, Any]:
    return {
        "a": case.a,
        "s": case.s,
        "window": case.window,
        "ranges": case.ranges,
        "geometry": case.geometry,
    }


def references(case: Case) -> list[KnownPosterior]:
    return [
        KnownPosterior(
            case.x[b],
            case.bank[slice(*case.ranges[b].tolist())],
            float(case.a[b]),
            float(case.s[b]),
            1 if case.window is None else int(case.window[b]),
            case.geometry,
        )
        for b in range(len(case))
    ]


def directions(case: Case, seed: int = 3) -> Tensor:
    return torch.randn(case.x.shape, generator=torch.Generator().manual_seed(seed))


def low_noise(case: Case, s: float) -> Case:
    """Queries at a level at which the logits are of size 1/s², near-ties among them."""
    count = len(case)
    clean = case.bank[case.ranges[:, 0]] + s * directions(case)
    return replace(case, x=clean, a=torch.ones(count).double(), s=torch.full((count,), s).double())


def exact(form: str, geometry: Geometry) -> bool:
    """Return whether an implementation computes in float64."""
    return form == "torch" or geometry.whole


def everything(case: Case, g: Tensor, form: str = "torch") -> list[Tensor]:
    operator = moments(case, form)
    return [
        *operator.statistics(case.x, **arguments(case)),
        operator.vjp(case.x, g, **arguments(case))[1],
        operator.jvp(case.x, g, **arguments(case))[1],
        *operator.without(case.x, 0, **arguments(replace(case, ranges=_two_or_more(case)))),
    ]


def _two_or_more(case: Case) -> Tensor:
    return torch.tensor([[0, len(case.bank)]] * len(case))
