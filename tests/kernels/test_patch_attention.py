"""Every implementation against the float64 reference, by every path through its tiles."""

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from tests.kernels.cases import (
    NAMES,
    Case,
    assert_within_budget,
    few,
    for_interpreter,
    operator,
    random_case,
)
from tests.support.rows import latin, telling

from els_kernels import GEOMETRIES, Geometry, Posterior, max_window, torch_tiled

# Odd and even sides, H ≠ W, more and fewer images than a vector has lanes, ragged last tiles,
# channels with and without code of their own, banks of bytes and of any floats.
BANKS = [
    ((37, 1, 5, 7), True),
    ((19, 3, 6, 4), False),
    ((3, 1, 1, 6), False),
    ((1, 2, 5, 5), True),
    ((2, 1, 1, 1), False),
]
SIZES = [shape for shape, _ in BANKS]
INTERPRETED = ("els-circular", "local-zeros", "equivariant-circular")
"""Machines of three kernels: what all have in common is tested with these in Triton."""


def interpreted(implementation: str, name: str) -> bool:
    """Return whether every run asks an implementation about a machine."""
    return implementation != "triton" or name in INTERPRETED


@functools.cache
def asked(name: str, shape: tuple[int, int, int, int], of_bytes: bool) -> tuple[Case, Posterior]:
    """Return queries with the answers of the specification."""
    case = random_case(NAMES[name], shape, of_bytes=of_bytes)
    return case, case.attend("reference")


def asked_of(
    implementation: str, name: str, shape: tuple[int, int, int, int], of_bytes: bool
) -> tuple[Case, Posterior]:
    """Return the queries that an implementation is asked, with the answers of the specification."""
    if implementation != "triton":
        return asked(name, shape, of_bytes)
    shape = few(implementation, shape[0]), *shape[1:]
    case = for_interpreter(implementation, random_case(NAMES[name], shape, of_bytes=of_bytes))
    return case, case.attend("reference")


# Triton meets every machine, with two or three of the banks.
@telling(
    lambda implementation, name, shape: (
        implementation != "triton" or ([*NAMES].index(name) + SIZES.index(shape)) % 2 == 0
    )
)
@pytest.mark.parametrize(("shape", "of_bytes"), BANKS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_it_equals_the_reference_at_every_window(
    implementation: str, name: str, shape: tuple[int, int, int, int], of_bytes: bool
) -> None:
    case, want = asked_of(implementation, name, shape, of_bytes)
    assert_within_budget(case, case.attend(implementation), want)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [
        # More places than the 64 keys of the smallest tile, so that it holds some rows of an image;
        (3, 1, 8, 9),
        # more images than that, so that it holds some images, and the last tile is ragged.
        (67, 2, 3, 4),
    ],
    ids=str,
)
@pytest.mark.parametrize(("tile", "block"), [(1, 1), (900, 2000)])
def test_it_equals_the_reference_however_small_its_tiles(
    monkeypatch: pytest.MonkeyPatch,
    geometry: Geometry,
    shape: tuple[int, int, int, int],
    tile: int,
    block: int,
) -> None:
    monkeypatch.setattr(torch_tiled, "_TILE", tile)
    monkeypatch.setattr(torch_tiled, "_BLOCK", block)
    windows = None if geometry.whole else [1, 3, max_window(geometry, *shape[2:])]
    case = random_case(geometry, shape, windows)
    assert_within_budget(case, case.attend("torch"), case.attend("reference"))


@functools.cache
def of_many_images(padding: str, images: int) -> tuple[Case, Posterior]:
    """Return queries to a bank of many images with the answers of the specification."""
    case = random_case(GEOMETRIES["els", padding], (images, 1, 5, 7), [3])
    return case, case.attend("reference")


@pytest.mark.slow
@latin(3, "implementation", "padding")
@pytest.mark.parametrize("padding", ["zeros", "circular", "valid"])
def test_it_equals_the_reference_on_a_bank_of_several_tiles_of_full_size(
    implementation: str, padding: str
) -> None:
    # At least 15 keys an image, 9e4 in all; a tile of torch holds 2²⁰ logits of 15 queries or more,
    # so 7e4, a chunk of the native kernel 96 images, and one of Triton 1e3 keys.
    case, want = of_many_images(padding, 71 if implementation == "triton" else 6001)
    assert_within_budget(case, case.attend(implementation), want)


@telling(lambda implementation, geometry: interpreted(implementation, geometry))
def test_an_answer_does_not_depend_on_how_the_bank_lies_in_memory(
    implementation: str, geometry: Geometry
) -> None:
    case = random_case(geometry, (5, 3, 4, 5), None if geometry.whole else [3])
    want = case.attend(implementation)
    strided = replace(
        case,
        bank=case.bank.to(memory_format=torch.channels_last),
        x=case.x.to(memory_format=torch.channels_last),
    )
    assert_within_budget(case, strided.attend(implementation), want)


def test_the_callers_modes_change_no_bit_and_an_answer_carries_no_gradient(
    any_implementation: str,
) -> None:
    case = random_case(GEOMETRIES["els", "zeros"], (5, 2, 6, 5), [3, 11])
    case = for_interpreter(any_implementation, case)
    want = case.attend(any_implementation)
    learned = replace(case, bank=case.bank.clone().requires_grad_(), x=case.x.requires_grad_())
    negated = replace(case, x=torch._neg_view(-case.x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answers = [case.attend(any_implementation), learned.attend(any_implementation)]
    answers.append(negated.attend(any_implementation))
    attention = operator(case.bank, any_implementation)
    # A default device for which there is no memory: whoever forgets the bank's finds nothing.
    with torch.device("meta"):
        answers.append(case.ask(attention))
    for got in answers:
        assert torch.equal(got.mean, want.mean)
        assert torch.equal(got.log_evidence, want.log_evidence)
        assert not got.mean.requires_grad


def test_python_threads_that_ask_at_once_get_the_same_bits(compiled: str) -> None:
    case = random_case(GEOMETRIES["els", "circular"], (40, 1, 9, 8), [3, 5])
    attention = operator(case.bank, compiled)
    want = case.ask(attention)
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda _: case.ask(attention), range(32)):
            assert torch.equal(got.mean, want.mean)
            assert torch.equal(got.log_evidence, want.log_evidence)


@telling(lambda any_implementation, geometry: interpreted(any_implementation, geometry))
@latin(2, "any_implementation", "geometry", "preserving")
@pytest.mark.parametrize("preserving", [False, True], ids=["exploding", "preserving"])
def test_it_stays_finite_and_within_the_bank_at_extreme_levels(
    any_implementation: str, geometry: Geometry, preserving: bool
) -> None:
    sigma = torch.tensor([1e-4, 1e-2, 1.0, 1e3, 1e6], dtype=torch.float64).repeat(2)
    size = torch.tensor([0.0] * 2 + [1.0] * 3 + [1e9, -1e9] * 2 + [1.0])[:, None, None, None]
    case = random_case(geometry, (3, 2, 3, 4), None if geometry.whole else [3])[[0, 1] * 5]
    a = (1 + sigma**2) ** -0.5 if preserving else torch.ones_like(sigma)
    extreme = replace(case, a=a, s=a * sigma, x=case.x * size)
    mean, evidence = extreme.attend(any_implementation)
    assert evidence.isfinite().all()
    # A mean of the bank cannot leave the bank; dividing by the weights' sum rounds once or twice.
    assert (mean - mean.clamp(case.bank.min(), case.bank.max())).abs().max() <= 1e-6


@telling(lambda any_implementation, geometry: interpreted(any_implementation, geometry))
def test_what_it_returns_is_float32_of_the_images_shape(
    any_implementation: str, geometry: Geometry
) -> None:
    case = random_case(geometry, (2, 3, 4, 5), None if geometry.whole else [3])
    posterior = case.attend(any_implementation)
    assert isinstance(posterior, Posterior)
    assert posterior.mean.shape == case.x.shape
    assert posterior.log_evidence.shape == (len(case), 4, 5)
    assert posterior.mean.dtype == posterior.log_evidence.dtype == torch.float32
