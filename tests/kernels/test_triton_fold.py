"""The fold in Triton, interpreted without a GPU: few and small cases, as the interpreter is slow.

Budgets are those of every implementation of the fold, see ``fold_cases``.
"""

from __future__ import annotations

import math
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from tests.kernels.cases import random_bank
from tests.kernels.fold_cases import (
    FOLD_NAMES,
    FoldCase,
    assert_fold_within_budget,
    fold_case,
)
from torch import Tensor

from els_kernels import ComputationStoppedError, Control, FoldedAttention
from els_kernels.fold import fastest_fold

# The project has to work without triton.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("triton") is None,
        reason="triton is not installed: pip install 'els-denoise[gpu]'",
    ),
]

LEVELS = dict(zip(FOLD_NAMES, [1.0, 0.05, 0.3, 1e-4, 1e-2, 0.3, 1.0], strict=True))
FOLDS = dict(zip(FOLD_NAMES, [0.2, 0.5, 0.5, 0.2, math.inf, 0.05, 1.0], strict=True))


def operator(case: FoldCase) -> FoldedAttention:
    """Return the operator in Triton, on a GPU where there is one."""
    bank = case.bank if isinstance(case.bank, Tensor) else list(case.bank)
    if torch.cuda.is_available():
        bank = bank.cuda() if isinstance(bank, Tensor) else [image.cuda() for image in bank]
    return FoldedAttention(bank, implementation="triton")


def assert_equals_the_reference(case: FoldCase) -> None:
    assert_fold_within_budget(case, case.ask(operator(case)), case.reference())


@pytest.mark.parametrize("name", FOLD_NAMES)
def test_the_fold_in_triton_equals_the_reference(name: str) -> None:
    bank = random_bank((1 if name in ("els-zeros", "els-valid") else 2, 1, 4, 3))
    pair = LEVELS[name], FOLDS[name]
    assert_equals_the_reference(fold_case(FOLD_NAMES[name], (4, 3), bank, 3, [pair]))


@pytest.mark.parametrize("window", [3, 19])
def test_tiles_overlap_and_a_large_window_covers_several_blocks(window: int) -> None:
    case = fold_case(
        FOLD_NAMES["local-zeros"], (36, 2), random_bank((1, 1, 36, 2)), window, [(0.3, 0.2)]
    )
    assert_equals_the_reference(case)


def test_more_channels_than_a_program_has_sums_are_shared_by_several() -> None:
    case = fold_case(FOLD_NAMES["local-inside"], (5, 4), random_bank((3, 5, 5, 4)), 3, [(0.3, 0.5)])
    assert_equals_the_reference(case)


def test_a_query_of_another_size_meets_images_of_different_sizes() -> None:
    images = [random_bank((1, 3, *size), seed)[0] for seed, size in enumerate([(3, 4), (4, 3)])]
    case = fold_case(FOLD_NAMES["els-inside"], (3, 3), images, 3, [(0.3, 0.5)])
    assert_equals_the_reference(replace(case, ranges=torch.tensor([[0, 2]])))


def test_slabs_and_chunks_are_merged_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from els_kernels.triton import plane_plan

    monkeypatch.setattr(plane_plan, "_SLAB_BYTES", 20_000)
    monkeypatch.setattr(plane_plan, "_MIN_SHIFTS", 2)
    case = fold_case(FOLD_NAMES["local-zeros"], (5, 4), random_bank((7, 1, 5, 4)), 3, [(0.5, 0.5)])
    assert_equals_the_reference(case)
    case = fold_case(FOLD_NAMES["els-inside"], (4, 3), random_bank((1, 1, 4, 3)), 3, [(0.5, 0.5)])
    assert_equals_the_reference(case)


def test_a_bank_of_bytes_has_the_bits_of_the_same_bank_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    bank = torch.randint(0, 256, (4, 2, 5, 4), dtype=torch.uint8, generator=generator)
    pixels = bank.float() / 127.5 - 1
    case = fold_case(FOLD_NAMES["local-zeros"], (5, 4), pixels, 3, [(0.3, 0.5)])
    got, want = (one.ask(operator(one)) for one in (replace(case, bank=bank), case))
    assert torch.equal(got.mean, want.mean)
    assert torch.equal(got.log_evidence, want.log_evidence)


@pytest.mark.parametrize("name", ["local-circular", "els-inside"])
def test_an_image_has_the_same_bits_alone_and_in_any_batch(name: str) -> None:
    pairs = [(0.3, 0.5), (0.05, math.inf)]
    case = fold_case(FOLD_NAMES[name], (3, 4), random_bank((1, 1, 3, 4)), 3, pairs)
    attention = operator(case)
    together = case.ask(attention)
    alone = case[[1]].ask(attention)
    assert torch.equal(alone.mean[0], together.mean[1])
    assert torch.equal(alone.log_evidence[0], together.log_evidence[1])


def test_no_pixel_outside_of_the_prepared_images_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from els_kernels import fold_plan
    from els_kernels.triton import plane_plan

    def between_infinities(images: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        chosen = prepared(images, rows, cols)
        guarded = chosen.new_full((3, *chosen.shape), torch.inf)
        guarded[1] = chosen
        return guarded[1]

    # What is read beside an image makes weights of NaN, and a warning of the interpreter.
    prepared = fold_plan.crop
    monkeypatch.setattr(plane_plan, "crop", between_infinities)
    for name in ("els-circular", "local-zeros"):
        case = fold_case(FOLD_NAMES[name], (3, 3), random_bank((1, 1, 3, 3)), 3, [(0.3, 0.5)])
        assert_equals_the_reference(case)


def test_a_query_far_from_the_bank_is_computed_in_float64() -> None:
    case = fold_case(FOLD_NAMES["els-inside"], (5, 4), random_bank((2, 1, 5, 4)), 3, [(1e-3, 0.5)])
    case = replace(case, x=case.x + 4)
    got, want = case.ask(operator(case)), case.attend("torch")
    assert torch.equal(got.mean, want.mean)
    assert torch.equal(got.log_evidence, want.log_evidence)


def test_a_stopped_fold_has_no_answer() -> None:
    case = fold_case(FOLD_NAMES["local-zeros"], (5, 4), random_bank((2, 1, 5, 4)), 3, [(0.3, 0.5)])
    stopped = Control()
    stopped.stop()
    with stopped, pytest.raises(ComputationStoppedError):
        case.ask(operator(case))


def test_triton_without_a_gpu_is_rejected_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"triton: expected a bank on a GPU .* got one on cpu"):
        FoldedAttention(torch.zeros(1, 1, 4, 4), implementation="triton")


def test_auto_takes_triton_for_a_fold_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # A tensor of no elements stands for the device: there is none here to put one on.
    monkeypatch.setattr("els_kernels.fold.triton_unavailable", lambda bank: None)
    assert fastest_fold(torch.device("meta")) == "triton"
    monkeypatch.setattr("els_kernels.fold.triton_unavailable", lambda bank: "no triton")
    assert fastest_fold(torch.device("meta")) == "torch"
