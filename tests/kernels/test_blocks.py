"""A bank in several parts answers with the bits of one, whatever the number of parts."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tests.kernels.bank_parts import OwnParts
from tests.kernels.cases import NAMES, Case, operator, random_case
from tests.kernels.moment_cases import arguments as arguments_of
from tests.support.rows import latin

from els_kernels import PatchAttention, PatchMoments, max_window
from els_kernels.blocks import Blocks, block_size

PARTS = [1, 2, 3, 8]
SHAPE = (5500, 1, 4, 5)
"""Eleven blocks, more than groups, the last of which is short."""


def case_of(name: str) -> Case:
    """Four queries: the whole bank, a range across blocks, one within a block, and a far query."""
    geometry = NAMES[name]
    window = 1 if geometry.whole else min(3, max_window(geometry, *SHAPE[2:]))
    case = random_case(geometry, SHAPE, [window, window])
    case.ranges[:] = torch.tensor([[0, 5500], [500, 1777], [3, 200], [0, 5500]])
    case.x[3] *= 1e4
    case.s[3] = 0.01
    return case


@functools.cache
def whole(name: str) -> tuple[Case, PatchAttention]:
    case = case_of(name)
    return case, operator(case.bank, "native-avx2")


def parted(case: Case, parts: int) -> PatchAttention:
    own = OwnParts(case.bank, parts)
    return PatchAttention.of_parts(own, float(case.bank.abs().max()))


@latin(2, "name", "parts")
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("name", NAMES)
def test_parts_of_a_bank_have_the_bits_of_the_whole(name: str, parts: int) -> None:
    case, one = whole(name)
    want, got = case.ask(one), case.ask(parted(case, parts))
    assert torch.equal(got.mean, want.mean)
    assert torch.equal(got.log_evidence, want.log_evidence)


@latin(2, "name", "parts")
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_moments_of_parts_have_the_bits_of_the_whole(name: str, parts: int) -> None:
    case, one = whole(name)
    queries = PatchMoments(one, case.bank), PatchMoments(parted(case, parts), case.bank)
    along = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(1))

    def answers(moments: PatchMoments) -> list[Any]:
        known = moments.evidence(case.x, **arguments_of(case))
        return [
            *moments.vjp(case.x, along, **arguments_of(case)),
            *moments.jvp(case.x, along, **arguments_of(case), evidence=known),
            *moments.statistics(case.x, **arguments_of(case), top=4),
            known,
        ]

    for want, got in zip(*map(answers, queries), strict=True):
        assert torch.equal(got, want)


def test_an_answer_in_part_is_that_of_the_bank_without_the_absent_blocks() -> None:
    case = case_of("els-zeros")[[0, 2]]
    one = parted(case, 4)
    arguments = one.validate(case.x, **arguments_of(case))
    native: Any = one.prepared
    got, shares = native.attend_some(*arguments)
    size = block_size(SHAPE[0])
    kept = torch.cat([case.bank[i * size : (i + 1) * size] for i in range(11) if i % 4 != 1])
    assert shares == [len(kept) / SHAPE[0], 1.0]
    want = PatchAttention(kept, implementation="native")(
        case.x[:1],
        a=case.a[:1],
        s=case.s[:1],
        window=None if case.window is None else case.window[:1],
        geometry=case.geometry,
    )
    assert torch.allclose(got.mean[:1], want.mean, atol=1e-5)
    assert torch.equal(got.mean[1:], case.ask(one).mean[1:])


def test_blocks_cover_a_bank_once_and_end_with_whole_vectors() -> None:
    for images in (1, 16, 511, 512, 513, 60_000, 1_280_000):
        size = block_size(images)
        assert size % 16 == 0
        for shards in PARTS[: Blocks.whole(images).count]:
            limits = sorted(
                each for i in range(shards) for each in Blocks.whole(images).shard(i, shards).limits
            )
            assert [lo for lo, _ in limits] == list(range(0, images, size))
            assert [hi for _, hi in limits] == [*range(size, images, size), images]


@pytest.mark.parametrize(
    ("shards", "first", "last"), [(1, [*range(8)], [1]), (2, [0, 2, 4, 6], [1]), (8, [0], [])]
)
def test_a_process_with_whole_groups_has_a_row_for_each(
    shards: int, first: list[int], last: list[int]
) -> None:
    blocks = [Blocks(5500, 512).shard(i, shards) for i in range(shards)]
    assert blocks[0].rows(0, 5500) == first
    # Of block 9 alone.
    assert blocks[-1].rows(9 * 512, 10 * 512) == last
    assert blocks[0].owners(0, 5500) == [group % shards for group in range(8)]


def test_a_process_without_whole_groups_has_a_row_for_each_block_by_group() -> None:
    blocks = [Blocks(5500, 512).shard(i, 3) for i in range(3)]
    assert [each.rows(0, 5500) for each in blocks] == [[0, 9, 3, 6], [1, 10, 4, 7], [8, 2, 5]]
    # Groups are 0, 8; 1, 9; 2, 10; 3; 4; 5; 6; 7.
    assert blocks[0].owners(0, 5500) == [0, 2, 1, 0, 2, 1, 0, 1, 2, 0, 1]
