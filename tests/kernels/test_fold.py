"""Patch attention with a fold: every implementation against the float64 reference."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from tests.kernels.cases import random_bank
from tests.kernels.conftest import has_fold_row, variant
from tests.kernels.fold_cases import (
    FOLD_NAMES,
    FOLD_VARIANTS,
    FOLDS,
    LEVELS,
    FoldCase,
    assert_fold_within_budget,
    fold_case,
)
from tests.support.rows import latin, telling

from els_kernels import (
    FOLD_GEOMETRIES,
    ComputationStoppedError,
    Control,
    FoldedAttention,
    Geometry,
    PatchAttention,
    count_fold_pairs,
    count_pairs,
    max_window,
)

ELS = [name for name in FOLD_NAMES if name.startswith("els")]
PAIRS = list(product(LEVELS, FOLDS))
few_rows = telling(lambda fold_variant, name: has_fold_row(fold_variant, name))


def variants(kind: str = "") -> list[Any]:
    return [variant(name) for name in FOLD_VARIANTS if name.startswith(kind)]


@pytest.fixture(params=variants())
def fold_variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def cyclic_pairs(offset: int, count: int = 6) -> list[tuple[float, float]]:
    """Return some (level, ρ), so that a few cases together cover all."""
    return [PAIRS[(offset + 11 * i) % len(PAIRS)] for i in range(count)]


@latin(3, "name", "turn")
@few_rows
@pytest.mark.parametrize("name", FOLD_NAMES)
@pytest.mark.parametrize("turn", [0, 1, 2])
@pytest.mark.slow
def test_it_equals_the_reference_at_every_window_level_and_fold(
    fold_variant: str, name: str, turn: int
) -> None:
    geometry, size = FOLD_NAMES[name], (7, 6)
    # One to three channels take turns.
    for index, window in enumerate(range(1, max_window(geometry, *size) + 1, 2)):
        channels = (index + turn) % 3 + 1
        bank = random_bank((3, channels, *size), channels)
        case = fold_case(geometry, size, bank, window, cyclic_pairs(5 * index + channels))
        assert_fold_within_budget(case, case.attend(fold_variant), case.reference())


@few_rows
@pytest.mark.parametrize("name", FOLD_NAMES)
def test_it_equals_the_reference_at_every_level_with_every_fold(
    fold_variant: str, name: str
) -> None:
    geometry = FOLD_NAMES[name]
    case = fold_case(geometry, (5, 6), random_bank((2, 1, 5, 6)), 3, PAIRS)
    assert_fold_within_budget(case, case.attend(fold_variant), case.reference())


@latin(2, "name", "size")
@few_rows
@pytest.mark.parametrize("name", ELS)
@pytest.mark.parametrize(
    ("size", "windows"),
    [((5, 5), (1, 5)), ((5, 11), (3, 5)), ((13, 6), (1, 3)), ((9, 19), (5,))],
)
@pytest.mark.slow
def test_a_query_of_another_size_than_the_bank_equals_the_reference(
    fold_variant: str, name: str, size: tuple[int, int], windows: tuple[int, ...]
) -> None:
    bank = random_bank((2, 3, 7, 9))
    for window in windows:
        case = fold_case(FOLD_NAMES[name], size, bank, window, cyclic_pairs(window))
        assert_fold_within_budget(case, case.attend(fold_variant), case.reference())


@few_rows
@pytest.mark.parametrize("name", ELS)
@pytest.mark.slow
def test_a_bank_of_images_of_different_sizes_equals_the_reference(
    fold_variant: str, name: str
) -> None:
    sizes = [(5, 8), (9, 6), (9, 6), (5, 8), (6, 6)]
    bank = [random_bank((1, 2, *size), seed)[0] for seed, size in enumerate(sizes)]
    case = fold_case(FOLD_NAMES[name], (6, 7), bank, 5, cyclic_pairs(0))
    case = FoldCase(**{**vars(case), "ranges": torch.tensor([[0, 5], [1, 4], [2, 3]] * 2)})
    assert_fold_within_budget(case, case.attend(fold_variant), case.reference())


@few_rows
@pytest.mark.parametrize("name", ["els-zeros", "els-circular", "els-inside", "local-zeros"])
@pytest.mark.slow
def test_a_bank_of_bytes_has_the_bits_of_the_same_bank_in_float32(
    fold_variant: str, name: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    bank = torch.randint(0, 256, (5, 3, 6, 7), dtype=torch.uint8, generator=generator)
    case = fold_case(FOLD_NAMES[name], (6, 7), bank.float() / 127.5 - 1, 3, cyclic_pairs(2))
    got = FoldCase(**{**vars(case), "bank": bank}).attend(fold_variant)
    want = case.attend(fold_variant)
    assert torch.equal(got.mean, want.mean)
    assert torch.equal(got.log_evidence, want.log_evidence)
    assert_fold_within_budget(case, got, case.reference())


@latin(2, "fold_variant", "dtype")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.slow
def test_groups_of_images_of_one_size_equal_the_images_alone_and_are_not_copied(
    fold_variant: str, dtype: torch.dtype
) -> None:
    sizes = [(2, 5, 8), (1, 9, 6), (3, 5, 8)]
    generator = torch.Generator().manual_seed(1)
    groups = [
        torch.randint(0, 2, (count, 2, *size), generator=generator).to(dtype)
        for count, *size in sizes
    ]
    case = fold_case(FOLD_NAMES["els-zeros"], (6, 7), groups[0][:1].float(), 3, cyclic_pairs(1))
    case = FoldCase(**{**vars(case), "ranges": torch.tensor([[0, 6], [1, 4], [2, 3]] * 2)})
    together = FoldCase(**{**vars(case), "bank": groups}).operator(fold_variant)
    alone = FoldCase(**{**vars(case), "bank": [image for group in groups for image in group]})
    got, want = case.ask(together), alone.attend(fold_variant)
    assert torch.equal(got.mean, want.mean)
    assert torch.equal(got.log_evidence, want.log_evidence)
    held = [group.data_ptr() for group in together.groups]
    assert held == [group.data_ptr() for group in groups]
    prepared: Any = together.prepared
    kept = prepared.groups if fold_variant.startswith("native") else prepared._groups
    assert held == [group.data_ptr() for group in kept]


@pytest.mark.parametrize(("name", "window"), [("els-inside", 7), ("els-zeros", 7)])
def test_columns_past_a_vector_and_rows_past_a_block_equal_the_reference(
    fold_variant: str, name: str, window: int
) -> None:
    bank = random_bank((1, 1, 23, 35))
    case = fold_case(FOLD_NAMES[name], (17, 33), bank, window, [(0.3, 0.2), (1.0, math.inf)])
    assert_fold_within_budget(case, case.attend(fold_variant), case.reference())


@few_rows
@pytest.mark.parametrize("name", FOLD_NAMES)
def test_a_fold_of_zero_has_the_bits_of_patch_attention(fold_variant: str, name: str) -> None:
    geometry = FOLD_NAMES[name]
    if geometry.padding == "inside":
        return
    bank = random_bank((5, 2, 6, 5))
    case = fold_case(geometry, (6, 5), bank, 3, [(0.3, 0.0), (1.0, 0.5), (0.05, 0.0)])
    got = case.attend(fold_variant)
    plain = PatchAttention(bank, implementation=fold_variant.partition("-")[0])
    want = plain(case.x, a=case.a, s=case.s, window=case.window, geometry=geometry)
    for b in (0, 2):
        assert torch.equal(got.mean[b], want.mean[b])
        assert torch.equal(got.log_evidence[b], want.log_evidence[b])
    assert not torch.equal(got.mean[1], want.mean[1])


@pytest.mark.parametrize("name", FOLD_NAMES)
def test_the_smallest_fold_of_a_small_window_is_the_centre_alone(
    fold_variant: str, name: str
) -> None:
    # The next patch weighs e^(-½ (1/ρ)²) = e^-200 where the window is 3.
    geometry = FOLD_NAMES[name]
    case = fold_case(geometry, (6, 5), random_bank((5, 2, 6, 5)), 3, [(0.3, 0.05), (0.3, 0.0)])
    case.x[1] = case.x[0]
    got = case.attend(fold_variant).mean
    assert (got[0] - got[1]).abs().max() <= 1e-5


@pytest.mark.parametrize("name", FOLD_NAMES)
def test_a_window_of_one_pixel_has_no_fold(fold_variant: str, name: str) -> None:
    bank = random_bank((4, 1, 5, 6))
    case = fold_case(FOLD_NAMES[name], (5, 6), bank, 1, [(0.3, 0.0), (0.3, 0.05), (0.3, math.inf)])
    case.x[:] = case.x[0].clone()
    got = case.attend(fold_variant).mean
    assert (got - got[0]).abs().max() <= 1e-5


@few_rows
@pytest.mark.parametrize("name", FOLD_NAMES)
def test_an_image_has_the_same_bits_alone_and_in_any_batch(fold_variant: str, name: str) -> None:
    case = fold_case(FOLD_NAMES[name], (9, 8), random_bank((40, 1, 9, 8)), 5, cyclic_pairs(3))
    attention = case.operator(fold_variant)
    together, backwards = case.ask(attention), case[range(len(case.x))[::-1]].ask(attention)
    for b in range(len(case.x)):
        alone = case[[b]].ask(attention)
        for batch, index in ((together, b), (backwards, -1 - b)):
            assert torch.equal(alone.mean[0], batch.mean[index])
            assert torch.equal(alone.log_evidence[0], batch.log_evidence[index])


# Not torch: a matmul library partitions its work by the number of threads.
@latin(3, "native", "name")
@pytest.mark.parametrize("native", variants("native"))
@pytest.mark.parametrize("name", ["els-inside", "els-zeros", "local-circular"])
def test_native_has_the_same_bits_for_any_number_of_threads(native: str, name: str) -> None:
    case = fold_case(FOLD_NAMES[name], (9, 8), random_bank((40, 1, 9, 8)), 5, cyclic_pairs(3))
    attention, before, answers = case.operator(native), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            answers.append(case.ask(attention))
    finally:
        torch.set_num_threads(before)
    for got in answers[1:]:
        # ρ = 0 is PatchAttention's, whose own tests cover it.
        assert torch.equal(got.mean, answers[0].mean)
        assert torch.equal(got.log_evidence, answers[0].log_evidence)


@latin(2, "fold_variant", "name")
@pytest.mark.parametrize("name", ELS)
@pytest.mark.slow
def test_a_mean_of_the_bank_does_not_leave_the_bank(fold_variant: str, name: str) -> None:
    bank = random_bank((3, 2, 8, 8))
    case = fold_case(FOLD_NAMES[name], (8, 8), bank, 5, PAIRS)
    got = case.attend(fold_variant).mean
    assert (got - got.clamp(bank.min(), bank.max())).abs().max() <= 2e-6


@few_rows
@pytest.mark.parametrize("name", FOLD_NAMES)
def test_progress_grows_and_a_stopped_fold_has_no_answer(fold_variant: str, name: str) -> None:
    case = fold_case(FOLD_NAMES[name], (6, 5), random_bank((5, 1, 6, 5)), 3, [(0.3, 0.5)] * 2)
    attention = case.operator(fold_variant)
    with Control() as control:
        watched = case.ask(attention)
    assert control.progress >= len(case.x)
    stopped = Control()
    stopped.stop()
    with stopped, pytest.raises(ComputationStoppedError):
        case.ask(attention)
    assert torch.equal(case.ask(attention).mean, watched.mean)


def test_local_patches_inside_with_a_uniform_fold_are_patch_posterior_composites(
    fold_variant: str,
) -> None:
    # w_i = softmax_i(-box(d_i) / 2σ²), D(p) = Σ_i x_i(p)·boxᵀ(w_i)(p) / boxᵀ(1)(p), an identity of
    # the composites that no implementation uses.
    bank, k = random_bank((6, 2, 8, 7)).double(), 3
    case = fold_case(FOLD_NAMES["local-inside"], (8, 7), bank.float(), k, [(0.5, math.inf)])
    distances = (case.x[0].double() - case.a[0] * bank).square().sum(1)
    sums = distances.unfold(1, k, 1).unfold(2, k, 1).sum((-1, -2))
    weights = (-sums / (2 * case.s[0] ** 2)).softmax(0)
    spread = torch.nn.functional.pad(weights, (k - 1,) * 4).unfold(1, k, 1).unfold(2, k, 1)
    spread = spread.sum((-1, -2))
    want = (bank * spread[:, None]).sum(0) / spread.sum(0)
    assert (case.attend(fold_variant).mean[0] - want).abs().max() <= 2e-6


@pytest.mark.parametrize("name", FOLD_NAMES)
def test_pairs_are_counted_as_patch_attention_counts_them(name: str) -> None:
    geometry, inside = FOLD_NAMES[name], Geometry("every", "inside")
    if geometry.padding == "inside":
        assert count_fold_pairs(inside, (7, 5), (6, 9), 3) == 5 * 3 * 4 * 7
        return
    for window in (1, 3, 5):
        pairs = count_fold_pairs(geometry, (7, 6), (7, 6), window)
        assert pairs == count_pairs(geometry, 7, 6, window)


BANK = torch.zeros(4, 2, 5, 6)
GOOD = {
    "x": torch.zeros(2, 2, 7, 6),
    "a": torch.ones(2),
    "s": torch.ones(2),
    "window": torch.tensor([3, 5]),
    "fold": torch.tensor([0.0, 0.05]),
    "geometry": FOLD_GEOMETRIES["els", "inside"],
}


@pytest.mark.parametrize("size", [(5, 6), (7, 6)])  # the bank's, and another
def test_numbers_may_be_lists(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, *size, generator=generator)
    tensors: dict[str, Any] = {
        **{name: value for name, value in GOOD.items() if name != "x"},
        "fold": torch.tensor([0.0, 0.5]),
        "ranges": torch.tensor([[0, 4], [1, 3]]),
        "geometry": FOLD_GEOMETRIES["els", "zeros"],
    }
    lists: dict[str, Any] = {
        name: value.tolist() if isinstance(value, torch.Tensor) else value
        for name, value in tensors.items()
    }
    fold = FoldedAttention(torch.rand(BANK.shape, generator=generator), implementation="torch")
    assert torch.equal(fold(x, **lists).mean, fold(x, **tensors).mean)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.zeros(2, 3, 7, 6)},
            r"x: expected shape \[B, 2, H, W\], got .* \[2, 3, 7, 6\]",
        ),
        ({"x": torch.zeros(2, 2, 7, 0)}, r"x: expected shape \[B, 2, H, W\]"),
        ({"x": torch.zeros(2, 2, 7, 6).double()}, "x: expected torch.float32 .* got torch.float64"),
        ({"x": torch.full((2, 2, 7, 6), math.nan)}, "x: expected finite pixels, got nan"),
        (
            {"geometry": FOLD_GEOMETRIES["local", "inside"]},
            "x: expected the size of .*5x6, got 7x6",
        ),
        ({"geometry": Geometry("same", "zeros", whole=True)}, "geometry: expected one of FOLD_"),
        ({"window": torch.tensor([3, 7])}, "window: expected odd from 1 to 5, got 7"),
        ({"window": torch.tensor([3, 4])}, "window: expected odd from 1 to 5, got 4"),
        ({"x": torch.zeros(2, 2, 3, 6)}, "window: expected odd from 1 to 3, got 5"),
        (
            {"fold": torch.tensor([0.0, 0.04], dtype=torch.float64)},
            "fold: expected 0 or at least 0.05, got 0.04",
        ),
        ({"fold": torch.tensor([0.0, -1.0])}, "fold: expected 0 or at least 0.05, got -1.0"),
        ({"fold": torch.tensor([0.0, math.nan])}, "fold: expected 0 or at least 0.05, got nan"),
        ({"fold": torch.zeros(3)}, r"fold: expected numbers \[2\], got .* \[3\]"),
        ({"fold": 0.5}, r"fold: expected numbers \[2\], got float"),
        ({"s": torch.tensor([1.0, 1e-30])}, "s: expected noise at which logits fit a float32"),
        ({"ranges": torch.tensor([[0, 4], [3, 5]])}, "ranges: expected 0 <= lo < hi <= 4"),
    ],
)
def test_an_illegal_argument_is_rejected_with_expected_and_got(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        FoldedAttention(BANK, implementation="torch")(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("bank", "message"),
    [
        ([], "bank: expected float32 images .* got none"),
        ([BANK[0], BANK[0, :1]], "bank: expected float32 images .*of equal C"),
        ([BANK[0], BANK], "bank: expected float32 images"),
        ([BANK[0].double()], "bank: expected float32 .* got torch.float64"),
        ([BANK[0], (127 * BANK[0]).byte()], "bank: expected float32 images .* got .*torch.uint8"),
        ([BANK, BANK[:0]], r"bank: expected float32 \[N, C, H, W\], none of them 0, or uint8, got"),
        (BANK[:0], r"bank: expected float32 \[N, C, H, W\], none of them 0"),
        ([BANK[0] + math.inf], "bank: expected finite pixels, got inf"),
    ],
)
def test_an_illegal_bank_is_rejected(bank: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FoldedAttention(bank)


def test_patch_attention_without_a_fold_has_no_patches_inside_the_image() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match="geometry: padding inside is answered by FoldedAttention"):
        PatchAttention(BANK)(
            BANK[:1], a=one, s=one, window=one.long(), geometry=Geometry("every", "inside")
        )
