import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.golden.make_noise import CASES, normal

from els_service.denoisers.noise import seeded_noise, standard_normal

GOLDEN = Path(__file__).parent.parent / "golden/noise.npz"


@pytest.mark.parametrize("number", range(len(CASES)))
def test_noise_has_the_bits_of_the_golden_file(number: int) -> None:
    with np.load(GOLDEN, allow_pickle=False) as golden:
        case = [int(value) for value in golden["cases"][number]]
        got = standard_normal(*case)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(
            got.view(np.uint32), golden[f"noise_{number}"].view(np.uint32)
        )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_golden_file_is_what_its_script_makes(case: tuple[int, int, int, int]) -> None:
    with np.load(GOLDEN, allow_pickle=False) as golden:
        np.testing.assert_array_equal(golden[f"noise_{CASES.index(case)}"], normal(*case))


def test_it_has_the_moments_of_a_standard_normal() -> None:
    numbers = standard_normal(7, 0, 0, 400_000).astype(np.float64)
    # Five times the standard deviation of each sample moment: √(1, 2, 15, 96) / √count.
    for power, want, spread in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert np.mean(numbers**power) == pytest.approx(want, abs=5 * np.sqrt(spread / 400_000))


def test_its_two_halves_of_a_pair_are_uncorrelated() -> None:
    pairs = standard_normal(8, 0, 0, 200_000).astype(np.float64).reshape(-1, 2)
    assert abs((pairs[:, 0] * pairs[:, 1]).mean()) < 5 / np.sqrt(100_000)


def test_an_image_has_its_noise_in_any_batch() -> None:
    together = seeded_noise(5, 6, (2, 3, 5))
    for draw, image in itertools.product([0, 1, 20], range(6)):
        alone = seeded_noise(5, 1, (2, 3, 5), first=image)
        assert torch.equal(together(draw)[image], alone(draw)[0])


def test_a_draw_can_be_had_without_those_before_it_and_again() -> None:
    noise = seeded_noise(1, 2, (1, 2, 2))
    late = noise(9)
    noise(0)
    assert torch.equal(noise(9), late)


def test_seeds_images_and_draws_all_differ() -> None:
    asked = itertools.product([0, 1, 2**64 - 1], [0, 1, 2**32], [0, 1, 1000])
    drawn = {standard_normal(*case, 8).tobytes() for case in asked}
    assert len(drawn) == 27


def test_a_shorter_draw_begins_like_a_longer_one() -> None:
    np.testing.assert_array_equal(standard_normal(3, 1, 2, 5), standard_normal(3, 1, 2, 50)[:5])


def test_it_comes_as_float64_images() -> None:
    noise = seeded_noise(0, 3, (2, 4, 5))(0)
    assert noise.shape == (3, 2, 4, 5)
    assert noise.dtype == torch.float64
