"""The same question has the same answer, to the last bit, whoever else is asked with it."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.cases import NAMES, Case, random_case

from els_kernels import PatchAttention, Posterior, max_window, tiled

POOL = 8


def pool(name: str, shape: tuple[int, int, int, int]) -> Case:
    """Queries with mixed levels, windows and ranges, some of which share their tiles."""
    geometry = NAMES[name]
    largest = max_window(geometry, *shape[2:])
    windows = [1] * 4 if geometry.whole else [3, 5, 3, largest]
    case = random_case(geometry, shape, windows)
    case.ranges[4] = case.ranges[0]
    return case


@functools.cache
def asked_alone(name: str, implementation: str) -> tuple[Case, PatchAttention, list[Posterior]]:
    case = pool(name, (9, 2, 6, 7))
    attention = PatchAttention(case.bank, implementation=implementation)
    return case, attention, [case[[i]].ask(attention) for i in range(POOL)]


def assert_same_bits(got: Posterior, alone: list[Posterior]) -> None:
    for i, want in enumerate(alone):
        assert torch.equal(got.mean[i], want.mean[0])
        assert torch.equal(got.log_evidence[i], want.log_evidence[0])


@pytest.mark.parametrize("name", NAMES)
@given(images=st.lists(st.integers(0, POOL - 1), min_size=1, max_size=9))
@settings(max_examples=10, deadline=None)
def test_an_image_is_answered_the_same_alone_and_in_any_batch_in_any_order(
    implementation: str, name: str, images: list[int]
) -> None:
    case, attention, alone = asked_alone(name, implementation)
    assert_same_bits(case[images].ask(attention), [alone[i] for i in images])


@pytest.mark.parametrize("name", NAMES)
def test_it_holds_for_matmuls_large_enough_to_be_split_among_threads(
    implementation: str, name: str
) -> None:
    case = pool(name, (50, 3, 13, 12))
    attention = PatchAttention(case.bank, implementation=implementation)
    alone = [case[[i]].ask(attention) for i in range(POOL)]
    assert_same_bits(case.ask(attention), alone)


@pytest.mark.parametrize("name", NAMES)
def test_it_holds_where_a_batch_is_cut_into_blocks(
    monkeypatch: pytest.MonkeyPatch, implementation: str, name: str
) -> None:
    monkeypatch.setattr(tiled, "_TILE", 2000)
    monkeypatch.setattr(tiled, "_BLOCK", 3000)
    case = pool(name, (9, 2, 6, 7))
    attention = PatchAttention(case.bank, implementation=implementation)
    alone = [case[[i]].ask(attention) for i in range(POOL)]
    assert_same_bits(case.ask(attention), alone)


def test_asking_twice_gives_the_same_bits(implementation: str) -> None:
    case, attention, alone = asked_alone("els-zeros", implementation)
    assert_same_bits(case.ask(attention), alone)
    assert_same_bits(case.ask(attention), alone)
