"""The same question has the same answer, to the last bit, whoever else is asked with it."""

from __future__ import annotations

import functools

import pytest
import torch
from tests.kernels.cases import NAMES, Case, operator, random_case
from tests.support.rows import telling

from els_kernels import PatchAttention, Posterior, max_window, torch_tiled

POOL = 8
COMPANIES = {
    "all": list(range(POOL)),
    "backwards": list(range(POOL))[::-1],
    "pairs": [6, 4],
    "twice": [3, 3, 0, 3],
}
"""Queries that are asked together, in this order."""


def pool(name: str, shape: tuple[int, int, int, int], size: int = POOL) -> Case:
    """Queries with mixed levels, windows and ranges, some of which share their tiles."""
    geometry = NAMES[name]
    largest = max_window(geometry, *shape[2:])
    windows = [1] * 4 if geometry.whole else [3, 5, 3, largest]
    case = random_case(geometry, shape, windows[-size // 2 :])
    case.ranges[size // 2] = case.ranges[0]
    return case


def ask(case: Case, attention: PatchAttention, threads: int) -> Posterior:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return case.ask(attention)
    finally:
        torch.set_num_threads(before)


def alone_by(implementation: str) -> int:
    """Return how many threads answer an image alone, where two answer a batch.

    The matmuls behind the torch path cut their operands by the number of threads.
    """
    return 2 if implementation == "torch" else 1


@functools.cache
def asked_alone(name: str, implementation: str) -> tuple[Case, PatchAttention, list[Posterior]]:
    """Return queries and their answers, each asked for itself."""
    # Triton's interpreter takes a thousand times as long as the others.
    case = pool(name, (5, 2, 5, 6), POOL // 2 if implementation == "triton" else POOL)
    attention = operator(case.bank, implementation)
    threads = alone_by(implementation)
    return case, attention, [ask(case[[i]], attention, threads) for i in range(len(case))]


def assert_same_bits(got: Posterior, alone: list[Posterior]) -> None:
    for i, want in enumerate(alone):
        assert torch.equal(got.mean[i], want.mean[0])
        assert torch.equal(got.log_evidence[i], want.log_evidence[0])


@telling(
    lambda any_implementation, name: (
        any_implementation != "triton"
        or name in ("els-zeros", "local-circular", "equivariant-circular")
    )
)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_an_image_is_answered_the_same_alone_and_in_any_batch_in_any_order(
    any_implementation: str, name: str
) -> None:
    case, attention, alone = asked_alone(name, any_implementation)
    for company in ("backwards", "twice") if any_implementation == "triton" else COMPANIES:
        images = [i % len(case) for i in COMPANIES[company][: len(case)]]
        assert_same_bits(ask(case[images], attention, 2), [alone[i] for i in images])


@pytest.mark.parametrize("name", NAMES)
def test_it_holds_for_work_large_enough_to_be_split_among_threads(compiled: str, name: str) -> None:
    case = pool(name, (150, 3, 13, 12))[[0, 3, 4, 5]]
    attention = operator(case.bank, compiled)
    alone = [ask(case[[i]], attention, alone_by(compiled)) for i in range(len(case))]
    assert_same_bits(ask(case, attention, 2), alone)


@pytest.mark.parametrize("name", NAMES)
def test_it_holds_where_a_batch_is_cut_into_blocks(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(torch_tiled, "_TILE", 2000)
    monkeypatch.setattr(torch_tiled, "_BLOCK", 3000)
    case = pool(name, (9, 2, 6, 7))
    attention = operator(case.bank, "torch")
    alone = [case[[i]].ask(attention) for i in range(POOL)]
    assert_same_bits(case.ask(attention), alone)
