"""Moments of a fold in Triton: the plan on every geometry, the kernels interpreted on small cases.

Budgets are those of every implementation, see ``fold_moment_cases``.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tests.kernels.cases import random_bank
from tests.kernels.fold_cases import FOLD_NAMES, FoldCase, fold_case
from tests.kernels.fold_moment_cases import (
    arguments,
    assert_product,
    assert_statistics,
    banks,
    budgets,
    directions,
    everything,
    moments,
    references,
)
from torch import Tensor

from els_kernels import FoldedAttention, FoldedMoments
from els_kernels.fold_arguments import bank_groups
from els_kernels.fold_plan import FoldQuery
from els_kernels.reference_fold_statistics import ReferenceFoldPosterior

pytest.importorskip("triton", reason="triton is not installed: pip install 'els-denoise[gpu]'")

from els_kernels.triton import plane_plan
from els_kernels.triton.cell_planes import BankLevels
from els_kernels.triton.line_moments import LineMoments
from els_kernels.triton.plane_plan import BLOCK


def normaliser(reference: ReferenceFoldPosterior) -> Tensor:
    """Return largest logit in bits, and Σ 2^(ℓ - largest), of the patches, [2, H, W]."""
    logits, _ = reference._logits(reference.x.double())
    bits = logits * math.log2(math.e)
    peak = bits.amax(1).float().double()
    out = torch.ones(2, *reference.x.shape[1:], dtype=torch.float64)
    rows, cols = reference._centres().T
    out[:, rows, cols] = torch.stack([peak, (bits - peak[:, None]).exp2().sum(1)])
    return out


def added_weights(lines: LineMoments, query: FoldQuery, groups: list[Tensor]) -> list[Tensor]:
    """Return π of every pixel by every pixel of each image, [HW, hw]: what the kernels add up.

    In float64, of the tensors of a launch, tile by tile and displacement by displacement.
    """
    plan, k, found = lines._plan, query.window, list[Tensor]()
    tiles, (height, width) = plan.tiles, query.size
    side = tiles.blocks * BLOCK + k - 1
    for part in plan.slabs(groups):
        slab = part.slab
        x, keys, _, patches, row_taps, col_taps, *classes = lines._tensors(part)
        down_taps, across_taps = (
            (taps[:, :, 0].double() + taps[:, :, 1].double() / 2048).movedim(1, axis).flatten(*to)
            for taps, axis, to in ((row_taps, 2, (2, 3)), (col_taps, 1, (1, 2)))
        )
        pi = torch.zeros(
            len(slab.keys), height, width, slab.rows.image, slab.cols.image, dtype=torch.float64
        )
        for shift in range(slab.rows.shifts * slab.cols.shifts):
            down, across = divmod(shift, slab.cols.shifts)
            to_row, to_col = plan.places(slab, torch.full((height, width), shift))
            for tile in range(tiles.count):
                i_row, i_col = divmod(tile, tiles.cols)
                row, col = i_row * tiles.step, i_col * tiles.step
                own = slice(row, row + side), slice(col, col + side)
                met = slice(row + down, row + down + side), slice(col + across, col + across + side)
                gaps = x[:, own[0], own[1]].double() - query.a * keys[:, :, met[0], met[1]].double()
                sums = gaps.square().sum(1).unfold(1, k, 1).unfold(2, k, 1).sum((-1, -2))
                count = side - k + 1
                same = [
                    one[at : at + count] == other[at + by : at + by + count]
                    for one, other, at, by in (
                        (classes[0], classes[2], row, down), (classes[1], classes[3], col, across)
                    )
                ]  # fmt: skip
                peak, inverse = patches[:, row : row + count, col : col + count].double()
                bits = -sums * (math.log2(math.e) / 2) / query.s**2 - peak
                weights = bits.exp2() * inverse * (same[0][:, None] & same[1]) / 2**14
                here = down_taps[i_row] @ weights @ across_taps[i_col]
                rows = torch.arange(row, min(row + tiles.step, height))[:, None]
                cols = torch.arange(col, min(col + tiles.step, width))
                pi[:, rows, cols, to_row[rows, cols], to_col[rows, cols]] += here[
                    :, : len(rows), : len(cols)
                ]
        found += list(pi.flatten(3).flatten(1, 2))
    return found


@pytest.mark.parametrize("name", FOLD_NAMES)
def test_a_pixel_meets_each_of_its_sources_with_all_its_patches(name: str) -> None:
    for size, bank, window in banks(name):
        assert_all_met(fold_case(FOLD_NAMES[name], size, bank, window, [(0.8, 0.5)]))


@pytest.mark.parametrize("name", ["local-circular", "els-inside"])
def test_tiles_of_pixels_meet_each_of_their_sources_too(name: str) -> None:
    for height, width, window in ((30, 3, 3), (11, 14, 11)):
        bank = random_bank((1, 1, height, width))
        assert_all_met(fold_case(FOLD_NAMES[name], (height, width), bank, window, [(0.8, 0.5)]))


def assert_all_met(case: FoldCase) -> None:
    (query,) = case.operator("torch").validate(case.x, **arguments(case))
    (reference,) = references(case)
    groups = bank_groups(case.bank)
    level = BankLevels(groups).level(query.x, query.a, query.s, query.window)
    lines = LineMoments(query, level, groups, "sm80", normaliser(reference))
    got = torch.cat(added_weights(lines, query, groups), 1)
    assert (got - torch.cat(reference.weights(), 1)).abs().max() <= 1e-6


def assert_moments(
    case: FoldCase, *, top: int = 5, kinds: tuple[str, ...] = ("statistics", "vjp", "jvp")
) -> None:
    """Assert the moments of one image."""
    found, g = moments(case, "triton"), directions(case)
    (reference,) = references(case)
    first = 0 if case.ranges is None else int(case.ranges[0, 0])
    slack = budgets(found, case, 0, reference)
    if "statistics" in kinds:
        got = found.statistics(case.x, **arguments(case), top=top)
        assert_statistics(got, 0, reference, first, slack)
    for kind in {"vjp", "jvp"} & set(kinds):
        mean, product = getattr(found, kind)(case.x, g, **arguments(case))
        assert ((mean[0] - reference.mean()).abs() <= slack.mean).all()
        assert_product(product[0], getattr(reference, kind)(g[0]), g[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pair"),
    [
        ("local-zeros", (0.3, math.inf)),
        ("local-circular", (1e-4, 0.5)),
        ("local-inside", (0.5, 0.0)),
    ],
)
def test_moments_of_one_source_an_image_equal_brute_force(
    name: str, pair: tuple[float, float]
) -> None:
    assert_moments(fold_case(FOLD_NAMES[name], (4, 3), random_bank((3, 2, 4, 3)), 3, [pair]))


@pytest.mark.slow
def test_moments_of_every_source_in_many_chunks_equal_brute_force(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Five chunks: a source that none of the two largest of their peaks reaches is not looked at.
    monkeypatch.setattr(plane_plan, "_MIN_SHIFTS", 2)
    case = fold_case(FOLD_NAMES["els-circular"], (3, 3), random_bank((1, 1, 3, 3)), 3, [(0.3, 0.5)])
    assert_moments(case, top=2)


@pytest.mark.slow
def test_weights_of_clipped_and_of_whole_patches_are_added_before_they_are_ranked() -> None:
    case = fold_case(FOLD_NAMES["els-zeros"], (3, 3), random_bank((1, 1, 3, 3)), 3, [(0.3, 0.5)])
    assert_moments(case, kinds=("statistics",))


@pytest.mark.slow
def test_moments_of_windows_of_several_blocks_equal_brute_force() -> None:
    bank = random_bank((2, 1, 16, 1))
    assert_moments(fold_case(FOLD_NAMES["local-zeros"], (16, 1), bank, 19, [(0.5, 0.5)]), top=2)


@pytest.mark.slow
def test_sources_of_images_of_different_sizes_are_numbered_through_the_bank() -> None:
    images = [random_bank((1, 1, *size), i)[0] for i, size in enumerate([(3, 3), (3, 4), (4, 3)])]
    case = fold_case(FOLD_NAMES["els-inside"], (3, 3), images, 3, [(0.5, 0.5)])
    case = replace(case, ranges=torch.tensor([[1, 3]]))
    assert_moments(case, top=2, kinds=("statistics",))


@pytest.mark.slow
def test_at_low_noise_near_ties_have_their_products() -> None:
    first = random_bank((1, 1, 6, 5))
    bank = torch.cat([first, first + 2e-5 * random_bank((1, 1, 6, 5), 7)])
    case = fold_case(FOLD_NAMES["local-circular"], (6, 5), bank, 3, [(1e-4, 0.5)])
    case = replace(case, x=bank[:1] + 1e-5 * directions(case))
    (reference,) = references(case)
    assert float(reference.entropy().max()) > 0.1
    assert_moments(case, top=2)


@pytest.mark.slow
def test_moments_of_a_fold_have_the_same_bits_alone_and_in_any_batch_and_of_a_bank_of_bytes() -> (
    None
):
    bank = random_bank((2, 1, 3, 3), of_bytes=True)
    case = fold_case(FOLD_NAMES["local-circular"], (3, 3), bank, 3, [(0.3, 0.5), (0.5, math.inf)])
    g = directions(case)
    stored = replace(case, bank=((bank + 1) * 127.5).round().to(torch.uint8))
    every = some_moments(case, g)
    for other in (case, stored):
        for got, want in zip(some_moments(other[[1]], g[[1]]), every, strict=True):
            assert torch.equal(got, want[[1]])


def some_moments(case: FoldCase, g: Tensor) -> list[Tensor]:
    found = moments(case, "triton")
    statistics = found.statistics(case.x, **arguments(case), top=2)
    return [*statistics, found.vjp(case.x, g, **arguments(case))[1]]


def test_moments_of_a_query_far_from_the_bank_are_computed_in_float64() -> None:
    case = fold_case(FOLD_NAMES["els-inside"], (5, 4), random_bank((2, 1, 5, 4)), 3, [(1e-3, 0.5)])
    case = replace(case, x=case.x + 4)
    for got, want in zip(everything(case, form="triton"), everything(case), strict=True):
        assert torch.equal(got, want)


def test_auto_is_triton_beside_a_fold_in_triton() -> None:
    attention = FoldedAttention(random_bank((1, 1, 4, 4)), implementation="triton")
    assert FoldedMoments(attention).implementation == "triton"
