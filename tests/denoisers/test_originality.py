"""Measures of originality, against loops over small banks, and images that are known copies."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from els_service.denoisers import originality
from els_service.denoisers.banks import Bank, make_bank
from els_service.denoisers.originality import MEASURES, NEIGHBOURS, report
from els_service.denoisers.source_measures import Sources, largest_region, seams, sources_of

Array = np.ndarray[Any, Any]
SHAPE = (2, 9, 6)


def bank_of(count: int, shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> Bank:
    images = np.random.default_rng(seed).integers(0, 256, (count, *shape)).astype(np.uint8)
    return make_bank(images)


def image_of(seed: int, shape: tuple[int, int, int] = SHAPE) -> Array:
    return np.random.default_rng(seed).normal(0, 0.5, shape).astype(np.float32)


def brute_distances(image: Array, bank: Bank) -> tuple[list[float], list[float]]:
    """Distances in float64: whole, and the largest of the tiles of a 4 × 4 grid."""
    whole, tiled = [], []
    for other in bank.pixels().numpy().astype(np.float64):
        square = (image - other) ** 2
        rows, columns = (
            [round(i * side / 4) for i in range(5)] for side in (image.shape[1], image.shape[2])
        )
        tiles = [
            square[:, top:bottom, left:right].sum()
            for top, bottom in itertools.pairwise(rows)
            for left, right in itertools.pairwise(columns)
        ]
        whole.append(math.sqrt(square.sum()))
        tiled.append(math.sqrt(max(tiles)))
    return whole, tiled


def random_sources(seed: int, images: int = 3, m: int = 4) -> tuple[Array, Array]:
    """Sources of a few images near each pixel, so that neighbours often agree."""
    rng = np.random.default_rng(seed)
    height, width = SHAPE[1:]
    sources = np.full((height, width, m, 3), -1)
    weights = np.zeros((height, width, m), np.float32)
    kinds = list(itertools.product(range(images), (0, 1), (0, 1)))
    for row, column in itertools.product(range(height), range(width)):
        count = rng.integers(1, m + 1)
        drawn = rng.choice(len(kinds), count, replace=False)
        for j, kind in enumerate(drawn.tolist()):
            image, down, across = kinds[kind]
            sources[row, column, j] = image, row + down, column + across
        share = np.sort(rng.choice([1.0, 0.6, 0.3], count))[::-1]
        weights[row, column, :count] = share / share.sum() * rng.choice([1.0, 0.8, 0.4])
    return sources, weights


def brute_sets(sources: Array, weights: Array) -> dict[tuple[int, int], set[tuple[int, int, int]]]:
    sets = {}
    for row, column in itertools.product(range(SHAPE[1]), range(SHAPE[2])):
        sets[row, column] = {
            (int(image), int(y) - row, int(x) - column)
            for (image, y, x), weight in zip(
                sources[row, column], weights[row, column], strict=True
            )
            if image >= 0 and weight >= 0.5 * weights[row, column, 0]
        }
    return sets


def brute_seams(sources: Array, weights: Array) -> float:
    sets = brute_sets(sources, weights)
    broken = pairs = 0
    for (row, column), own in sets.items():
        for other in ((row + 1, column), (row, column + 1)):
            if other not in sets:
                continue
            if all(
                weights[one][weights[one] >= 0.5 * weights[one][0]].sum() >= 0.5
                for one in ((row, column), other)
            ):
                pairs += 1
                broken += not own & sets[other]
    return broken / pairs


def brute_region(sources: Array, weights: Array) -> float:
    sets = brute_sets(sources, weights)
    best = 0
    for kind in set().union(*sets.values()):
        left = {place for place, own in sets.items() if kind in own}
        while left:
            frontier, size = [left.pop()], 1
            while frontier:
                row, column = frontier.pop()
                for other in ((row - 1, column), (row + 1, column), (row, column - 1)):
                    if other in left:
                        left.remove(other)
                        frontier.append(other)
                        size += 1
                if (row, column + 1) in left:
                    left.remove((row, column + 1))
                    frontier.append((row, column + 1))
                    size += 1
            best = max(best, size)
    return best / (SHAPE[1] * SHAPE[2])


@pytest.mark.parametrize("count", [2, 50, 51, 120])
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_distances_and_ratios_are_those_of_brute_force(
    count: int, kind: type[np.generic], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(originality, "_BLOCK_BYTES", 7 * 4 * math.prod(SHAPE))
    bank, image = bank_of(count), image_of(1)
    if kind is np.float32:
        bank = make_bank(bank.pixels().numpy())
    whole, tiled = brute_distances(image, bank)
    found = report(image, bank)
    order = np.argsort(whole)[:NEIGHBOURS]
    assert found.nearest.tolist() == order.tolist()
    assert found.distances == pytest.approx(np.array(whole)[order], rel=1e-6)
    assert found.gap_ratio == pytest.approx(sorted(whole)[0] / sorted(whole)[1], rel=1e-6)
    if count > 50:
        mean = sum(sorted(tiled)[:50]) / 50
        assert found.carlini_ratio == pytest.approx(min(tiled) / (0.5 * mean), rel=1e-6)
    else:
        assert found.carlini_ratio is None
        assert found.absent["carlini_ratio"] == (
            f"needs a bank of at least 51 images, this has {count}"
        )


def test_a_copy_with_little_noise_is_memorised_and_a_random_image_is_not() -> None:
    bank = bank_of(80)
    copy = bank.pixels_of(slice(17, 18))[0] + np.float32(0.01) * image_of(2)
    found, other = report(copy, bank), report(image_of(3), bank)
    assert found.nearest[0] == 17
    assert found.gap_ratio is not None
    assert other.gap_ratio is not None
    assert found.gap_ratio < 0.05
    assert found.carlini_ratio is not None
    assert found.carlini_ratio < 0.1
    assert other.gap_ratio > 0.9
    assert report(bank.pixels_of(slice(17, 18))[0], bank).gap_ratio == 0


def test_distances_of_near_copies_keep_their_precision() -> None:
    bank = make_bank(np.full((3, *SHAPE), 0.9, np.float32))
    image = bank.images[0] + np.float32(1e-4)
    want = np.sqrt(((image.astype(np.float64) - bank.images[0]) ** 2).sum())
    assert report(image, bank).distances[0] == pytest.approx(want, rel=1e-6)


def test_a_bank_of_one_picture_has_no_ratios_and_says_why() -> None:
    found = report(image_of(1), bank_of(1))
    assert found.gap_ratio is None
    assert found.absent["gap_ratio"] == "needs a bank of at least 2 images, this has 1"
    assert found.distances.shape == (1,)


def test_an_image_of_another_size_has_no_distances_and_says_why() -> None:
    found = report(image_of(1, (2, 5, 6)), bank_of(60))
    assert found.nearest.shape == (0,)
    assert found.absent["gap_ratio"] == "needs a bank of images of its size, 2×5×6"
    assert found.absent["carlini_ratio"] == found.absent["gap_ratio"]


def test_a_measure_is_given_or_has_a_reason() -> None:
    sources, weights = random_sources(0)
    shares = np.array([0.2, 0.7, 0.1])
    alone = report(image_of(1), bank_of(3))
    explained = report(image_of(1), bank_of(3), sources, weights, shares)
    for found in (alone, explained, report(image_of(1), bank_of(60))):
        assert {name for name in MEASURES if getattr(found, name) is None} == set(found.absent)


@pytest.mark.parametrize("seed", range(8))
def test_seams_and_regions_are_those_of_brute_force(seed: int) -> None:
    sources, weights = random_sources(seed)
    found = sources_of(sources, weights, wraps=False)
    assert seams(found) == pytest.approx(brute_seams(sources, weights))
    assert largest_region(found) == pytest.approx(brute_region(sources, weights))


def copied(shift: int, split: int, *, wraps: bool = False) -> Sources:
    """An image whose left part is image 0 in place, and whose right part is image 1, shifted."""
    height, width = SHAPE[1:]
    rows, columns = np.mgrid[:height, :width]
    images = (columns >= split).astype(int)
    moved = rows + shift * images
    if wraps:
        moved %= height
    sources = np.stack([images, moved, columns], -1)[:, :, None]
    return sources_of(sources, np.ones((height, width, 1), np.float32), wraps=wraps)


def test_two_halves_of_two_images_have_one_seam() -> None:
    height, width = SHAPE[1:]
    found = copied(2, 2)
    assert seams(found) == pytest.approx(height / (height * (width - 1) + (height - 1) * width))
    assert largest_region(found) == pytest.approx(4 / 6)


def test_a_displacement_continues_across_the_border_of_a_torus() -> None:
    assert largest_region(copied(2, 0)) == 1
    assert largest_region(copied(2, 0, wraps=True)) == 1
    assert seams(copied(2, 0, wraps=True)) == 0
    wrapped = copied(2, 0, wraps=True)
    assert (wrapped.rows == 2).all()


def test_pixels_with_a_large_number_of_sources_make_no_seams() -> None:
    sources, weights = random_sources(0)
    found = sources_of(sources, weights * np.float32(0.1), wraps=False)
    assert not found.clear.any()
    assert seams(found) is None


@pytest.mark.parametrize(
    ("shares", "count"),
    [([1.0], 1), ([0.9, 0.1], 1), ([0.5, 0.25, 0.25], 3), ([0.1] * 10, 9), ([0.0, 0.0, 1.0], 1)],
)
def test_ninety_percent_of_the_sources_are_counted(shares: list[float], count: int) -> None:
    assert originality.sources_of_90(np.array(shares)) == count


def test_shares_name_the_largest_source() -> None:
    sources, weights = random_sources(1)
    found = report(image_of(1), bank_of(3), sources, weights, np.array([0.2, 0.7, 0.1]))
    assert (found.largest_share, found.largest_image, found.sources_of_90) == (0.7, 1, 2)
    assert found.in_place == pytest.approx(
        np.mean([any(k[1:] == (0, 0) for k in s) for s in brute_sets(sources, weights).values()])
    )


def test_pixels_of_which_no_two_agree_are_regions_of_their_own() -> None:
    sources = np.zeros((2, 3, 1, 3), np.int64)
    sources[..., 0, 0] = np.arange(6).reshape(2, 3)
    found = sources_of(sources, np.ones((2, 3, 1), np.float32), wraps=False)
    assert largest_region(found) == pytest.approx(1 / 6)
    assert seams(found) == 1
    none = sources_of(np.full_like(sources, -1), np.zeros((2, 3, 1), np.float32), wraps=False)
    assert largest_region(none) == 0


def test_displacements_in_images_that_wrap_are_remainders_by_the_sides_of_each() -> None:
    sources = np.array([[[[0, 3, 1]], [[1, 1, 0]]]])
    extents = np.array([[3, 2], [2, 5]])
    found = sources_of(sources, np.ones((1, 2, 1), np.float32), wraps=True, extents=extents)
    assert found.rows[0, :, 0].tolist() == [0, 1]
    assert found.columns[0, :, 0].tolist() == [1, 4]
