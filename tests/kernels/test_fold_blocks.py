"""Folds of a bank in several parts have the bits of one, whatever the number of parts."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from tests.kernels.cases import random_bank
from tests.kernels.fold_cases import FOLD_NAMES, FoldCase, assert_fold_within_budget, fold_case
from tests.kernels.fold_moment_cases import arguments, directions
from tests.kernels.fold_parts import OwnFoldParts

from els_kernels import FoldedAttention, FoldedMoments
from els_kernels.native import PartedFoldImages

SHAPE = 1, 3, 4
IMAGES = 1300
"""Three blocks, the last of which is short."""
PAIRS = [(0.5, 0.1), (0.3, float("inf")), (0.6, 0.2), (1e-3, 0.5)]
"""(s, ρ); the last query is far from the bank."""
RANGES = torch.tensor([[0, 1300], [500, 1030], [3, 200], [0, 1300]])


@functools.cache
def case_of(name: str, dtype: torch.dtype, images: int = IMAGES) -> FoldCase:
    bank = random_bank((images, *SHAPE))
    one = fold_case(FOLD_NAMES[name], SHAPE[1:], bank, 3, PAIRS)
    one.x[3] *= 1e4
    if dtype == torch.uint8:
        bank = (bank.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    return replace(one, bank=bank, ranges=RANGES)


def answers(operator: FoldedAttention, case: FoldCase) -> list[torch.Tensor]:
    near = case[[0, 1, 2]]
    moments, along, options = FoldedMoments(operator), directions(near), arguments(near)
    return [
        *case.ask(operator),
        *moments.statistics(near.x, **options, top=4),
        *moments.vjp(near.x, along, **options),
        *moments.jvp(near.x, along, **options),
        *moments.without(near.x[:2], 510, **arguments(near[[0, 1]])),
    ]


@functools.cache
def whole(name: str, dtype: torch.dtype, images: int) -> list[torch.Tensor]:
    case = case_of(name, dtype, images)
    return answers(FoldedAttention(case.bank, implementation="native"), case)


def check(name: str, parts: int, dtype: torch.dtype, images: int = IMAGES) -> None:
    case = case_of(name, dtype, images)
    assert isinstance(case.bank, torch.Tensor)
    own = PartedFoldImages(OwnFoldParts(case.bank, parts))
    got = answers(FoldedAttention.of_parts(own, largest=4.0), case)
    for want, one in zip(whole(name, dtype, images), got, strict=True):
        assert torch.equal(one, want)


@pytest.mark.parametrize("name", FOLD_NAMES)
def test_three_parts_of_a_bank_have_the_bits_of_the_whole(name: str) -> None:
    check(name, 3, torch.uint8)


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_any_number_of_parts_has_the_bits_of_the_whole(parts: int) -> None:
    check("local-inside", parts, torch.float32, images=3900)


@pytest.mark.parametrize("name", ["els-zeros", "local-inside"])
@pytest.mark.slow
def test_a_bank_of_several_blocks_is_within_the_budgets_of_a_fold(name: str) -> None:
    case = case_of(name, torch.float32)[[0, 1]]
    assert_fold_within_budget(case, case.attend("native-avx2"), case.reference())
