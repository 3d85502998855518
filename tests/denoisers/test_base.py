from typing import Any

import numpy as np
import pytest
import torch
from tests.support.denoisers import SHAPE, random_images

from els_service.denoisers.answers import score
from els_service.denoisers.banks import Bank
from els_service.denoisers.base import Denoised, Denoiser, concatenate, make_query, one_each
from els_service.denoisers.folded import FoldedDenoiser
from els_service.denoisers.levels import from_sigma, from_time
from els_service.errors import InvalidArgumentError


@pytest.mark.parametrize(
    ("values", "want"),
    [((), [-1, -1, -1]), (4, [4, 4, 4]), ([4], [4, 4, 4]), ([4, -1, 5], [4, -1, 5])],
)
def test_values_are_none_one_or_one_for_each_image(
    values: int | list[int], want: list[int]
) -> None:
    got = one_each("labels", values, 3, none=-1)
    assert got.tolist() == want
    assert got.dtype == np.int64


@pytest.mark.parametrize("field", ["labels", "windows"])
@pytest.mark.parametrize("count", [2, 4])
def test_any_other_number_of_values_is_refused(field: str, count: int) -> None:
    values: dict[str, Any] = {field: [1] * count}
    with pytest.raises(
        InvalidArgumentError, match=f"{field}: expected none, 1 or 3 values, got {count} values"
    ):
        make_query(torch.zeros(3, *SHAPE), from_sigma([1.0]), **values)


def test_queries_are_taken_apart_and_put_together_again() -> None:
    x = random_images((4, *SHAPE))
    query = make_query(x, from_time([0.1, 0.2, 0.3, 0.4]), [0, -1, 2, 0], [3, 0, 5, 1])
    again = concatenate([query[:1], query[1:3], query[3:]])
    assert len(again) == 4
    assert torch.equal(again.x, x)
    for name in ("a", "s"):
        np.testing.assert_array_equal(getattr(again.level, name), getattr(query.level, name))
    np.testing.assert_array_equal(again.labels, [0, -1, 2, 0])
    np.testing.assert_array_equal(again.windows, [3, 0, 5, 1])
    assert concatenate([query]) is query


def test_answers_are_taken_apart_with_their_evidence() -> None:
    mean, evidence = random_images((3, *SHAPE)), random_images((3, 5, 6))
    part = Denoised(mean.numpy(), evidence.numpy())[1:]
    assert torch.equal(part.mean, mean[1:])
    assert part.log_evidence is not None
    assert np.array_equal(part.log_evidence, evidence[1:].numpy())
    assert Denoised(mean.numpy(), None)[1:].log_evidence is None


def test_the_score_is_a_times_d_minus_x_over_s_squared(denoiser: Denoiser) -> None:
    level = from_time([0.05, 0.5, 1.0])
    query = make_query(random_images((3, *SHAPE), 5), level)
    mean = denoiser.denoise(query).mean
    got = score(query, mean)
    a, s = (torch.tensor(values)[:, None, None, None] for values in (level.a, level.s))
    want = (a * mean.double() - query.x) / s**2
    assert got.dtype == torch.float32
    # a, a·D, the difference and its product with 1/s² are each rounded once.
    slack = 2.0**-24 / s**2 * (2 * (a * mean).abs() + 3 * (a * mean - query.x).abs())
    assert ((got - want).abs() <= slack + 1e-30).all()


def test_the_score_points_the_same_way_for_either_convention(denoiser: Denoiser) -> None:
    # p(x; a, s) is p(x/a; σ) up to a constant, so its gradient is 1/a times as long.
    level = from_time([0.1, 0.5])
    x = random_images((2, *SHAPE), 5)
    a = torch.tensor(level.a)[:, None, None, None]
    preserving = make_query(x, level)
    exploding = make_query((x / a).float(), from_sigma(level.sigma))
    got = score(preserving, denoiser.denoise(preserving).mean)
    want = score(exploding, denoiser.denoise(exploding).mean) / a
    error = (got - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)
    assert (error <= 2e-4).all()


def test_every_kind_tells_what_it_keeps_in_memory(denoiser: Denoiser, labelled: Bank) -> None:
    pixels = labelled.images.size
    images = 8 * pixels  # float32, as they are and as they are computed with
    dimensions = pixels // len(labelled.images)
    expected = {
        "analytic": images,
        "gaussian": 2 * 8 * dimensions,
        # All images, then five of one label and four of the other: fewer than dimensions.
        "wiener": images + 4 * dimensions * (9 + 5 + 4),
        # Three perturbations.
        "smoothed": images + 3 * 4 * dimensions,
        # Eigenvectors in float64, and the most that masks may take.
        "pca": images + 8 * dimensions * (9 + 5 + 4) + (64 << 20),
    }
    if isinstance(denoiser, FoldedDenoiser):
        # The fold and its moments share the memory of the bank.
        expected["analytic"] -= 4 * pixels
    assert denoiser.info.memory_bytes == expected[denoiser.info.kind]
