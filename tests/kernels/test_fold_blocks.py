"""Folds of a bank in several parts have the bits of one, whatever the number of parts."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from tests.kernels.cases import random_bank
from tests.kernels.fold_cases import FOLD_NAMES, assert_fold_within_budget, fold_case
from tests.kernels.fold_moment_cases import arguments, directions
from tests.kernels.fold_parts import OwnFoldParts

from els_kernels import FoldedAttention, FoldedMoments
from els_kernels.native import PartedFoldImages

SHAPE = (1300, 1, 4, 5)
"""Three blocks, the last of which is short; more parts than blocks have none of a range."""
PAIRS = [(0.5, 0.1), (0.3, math.inf), (0.05, 0.5), (0.6, 0.2), (1e-3, 0.5)]
"""(s, ρ); the last query is far from the bank."""
RANGES = torch.tensor([[0, 1300], [500, 1030], [3, 200], [1100, 1300], [0, 1300]])


@functools.cache
def case_of(name: str, dtype: torch.dtype) -> Any:
    bank = random_bank(SHAPE)
    if dtype == torch.uint8:
        bank = (bank.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    one = fold_case(FOLD_NAMES[name], SHAPE[2:], random_bank(SHAPE), 3, PAIRS)
    one.x[4] *= 1e4
    object.__setattr__(one, "bank", bank)
    object.__setattr__(one, "ranges", RANGES)
    return one


def parted(bank: torch.Tensor, parts: int) -> FoldedAttention:
    return FoldedAttention.of_parts(PartedFoldImages(OwnFoldParts(bank, parts)), largest=4.0)


def answers(operator: FoldedAttention, case: Any) -> list[torch.Tensor]:
    moments, along = FoldedMoments(operator), directions(case)
    near = case[[0, 1, 2, 3]]
    return [
        *case.ask(operator),
        *moments.statistics(case.x, **arguments(case), top=4),
        *moments.vjp(case.x, along, **arguments(case)),
        *moments.jvp(case.x, along, **arguments(case)),
        *moments.without(near.x[:2], 510, **arguments(near[[0, 1]])),
    ]


@functools.cache
def whole(name: str, dtype: torch.dtype) -> list[torch.Tensor]:
    case = case_of(name, dtype)
    return answers(FoldedAttention(case.bank, implementation="native"), case)


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("name", FOLD_NAMES)
def test_parts_of_a_bank_have_the_bits_of_the_whole(name: str, parts: int) -> None:
    dtype = torch.float32 if parts == 1 else torch.uint8
    case, want = case_of(name, dtype), whole(name, dtype)
    got = answers(parted(case.bank, parts), case)
    for index, (one, other) in enumerate(zip(want, got, strict=True)):
        assert torch.equal(one, other), index


@pytest.mark.parametrize("name", ["els-zeros", "local-inside"])
def test_a_bank_of_several_blocks_is_within_the_budgets_of_a_fold(name: str) -> None:
    case = case_of(name, torch.float32)[[0, 1, 2]]
    assert_fold_within_budget(case, case.attend("native-avx2"), case.reference())
