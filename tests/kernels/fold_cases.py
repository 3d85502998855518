"""Random queries for patch attention with a fold, and how far an answer may lie from the reference.

Budgets are derived as in ``cases``: a logit is rounded to a few eps32 of its size, 1e-4 of the mean
at levels where logits of these images stay below 1e3. Below that level the mean is a mean of
patches whose distances agree to eps32, so that they differ by √(2·eps32) = 5e-4 of their norm at
most, and by far less where no two keys are that close: the same budget holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from tests.kernels.cases import random_bank, relative_errors
from torch import Tensor

from els_kernels import FOLD_GEOMETRIES, FoldedAttention, Geometry, Posterior
from els_kernels.fold import FOLD_IMPLEMENTATIONS, FoldImplementation
from els_kernels.native import NativeFold

FOLD_NAMES = {f"{machine}-{padding}": g for (machine, padding), g in FOLD_GEOMETRIES.items()}
LEVELS = (1.0, 0.3, 0.05, 1e-2, 1e-4)
FOLDS = (0.0, 0.05, 0.2, 0.5, 1.0, math.inf)
MEAN_BUDGET = 1e-4

FOLD_VARIANTS: dict[str, Callable[[Sequence[Tensor]], FoldImplementation]] = {
    "torch": FOLD_IMPLEMENTATIONS["torch"],
    "native-avx512": partial(NativeFold, instruction_set="avx512"),
    "native-avx2": partial(NativeFold, instruction_set="avx2"),
    "native-baseline": partial(NativeFold, instruction_set="baseline"),
}
"""Every implementation that is compared with the reference, for each instruction set."""


_REFERENCES: dict[tuple[object, ...], Posterior] = {}


@dataclass(frozen=True, eq=False)
class FoldCase:
    """A bank and a batch of queries, each with its own level, window, fold and range."""

    geometry: Geometry
    bank: Tensor | Sequence[Tensor]
    x: Tensor
    s: Tensor
    window: Tensor
    fold: Tensor
    ranges: Tensor | None = None

    @property
    def a(self) -> Tensor:
        """Signal scales: variance preserving."""
        return (1 - self.s.double().square()).clamp(min=1e-4).sqrt()

    def operator(self, variant: str) -> FoldedAttention:
        kind = variant.partition("-")[0]
        with pytest.MonkeyPatch.context() as patch:
            if variant in FOLD_VARIANTS:
                patch.setitem(FOLD_IMPLEMENTATIONS, kind, FOLD_VARIANTS[variant])
            return FoldedAttention(self.bank, implementation=kind)

    def attend(self, variant: str) -> Posterior:
        return self.ask(self.operator(variant))

    def reference(self) -> Posterior:
        """Return what the reference answers; computed once for all variants."""
        tensors = [self.x, self.s, self.window, self.fold, *self.bank]
        tensors += [] if self.ranges is None else [self.ranges]
        name = self.geometry, *(t.contiguous().numpy().tobytes() for t in tensors)
        if name not in _REFERENCES:
            _REFERENCES[name] = self.attend("reference")
        return _REFERENCES[name]

    def ask(self, attention: FoldedAttention) -> Posterior:
        mean, evidence = attention(
            self.x.to(attention.device), a=self.a, s=self.s, window=self.window, fold=self.fold,
            ranges=self.ranges, geometry=self.geometry,
        )  # fmt: skip
        return Posterior(mean.cpu(), evidence.cpu())

    def __getitem__(self, images: Sequence[int]) -> FoldCase:
        chosen = torch.tensor(images)
        return replace(
            self,
            x=self.x[chosen],
            s=self.s[chosen],
            window=self.window[chosen],
            fold=self.fold[chosen],
            ranges=None if self.ranges is None else self.ranges[chosen],
        )


def fold_case(
    geometry: Geometry,
    size: tuple[int, int],
    bank: Tensor | Sequence[Tensor],
    window: int,
    pairs: Sequence[tuple[float, float]],
    seed: int = 0,
) -> FoldCase:
    """Return one query for each (level, ρ), all of one window: smooth images with noise."""
    generator = torch.Generator().manual_seed(seed)
    channels = bank[0].shape[0]
    clean = random_bank((len(pairs), channels, *size), seed + 1)
    if isinstance(bank, Tensor) and bank.shape[2:] == size:
        # Every other query is a noisy image of the bank, of which one patch wins at low noise.
        clean[::2] = bank[torch.arange(len(clean[::2])) % len(bank)]
    s = torch.tensor([level for level, _ in pairs], dtype=torch.float64)
    a = (1 - s.square()).clamp(min=1e-4).sqrt()
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    x = a[:, None, None, None] * clean + s[:, None, None, None] * noise
    windows = torch.full((len(pairs),), window)
    folds = torch.tensor([fold for _, fold in pairs], dtype=torch.float64)
    return FoldCase(geometry, bank, x.float(), s, windows, folds)


def assert_fold_within_budget(case: FoldCase, got: Posterior, want: Posterior) -> None:
    """Assert the budgets image by image."""
    assert got.mean.isfinite().all()
    assert (relative_errors(got.mean, want.mean) <= MEAN_BUDGET).all()
    errors = (got.log_evidence.double() - want.log_evidence).abs().flatten(1).amax(1)
    assert (errors <= fold_evidence_budgets(case, want.log_evidence)).all()


def fold_evidence_budgets(case: FoldCase, evidence: Tensor) -> Tensor:
    """Return 8·eps32·(largest logit) + 2·eps32·(1 + |evidence|) of each image, as in ``cases``.

    k²·C·(max|x| + a·max|φ|)² / 2s² bounds every logit.
    """
    eps = torch.finfo(torch.float32).eps
    largest = max(float(image.abs().max()) for image in case.bank)
    size = case.x.abs().flatten(1).amax(1).double() + case.a * largest
    depth = case.window.double().square() * case.x.shape[1]
    logits = depth * size.square() / (2 * case.s.square())
    return 8 * eps * logits + 2 * eps * (1 + evidence.abs().flatten(1).amax(1).double())
