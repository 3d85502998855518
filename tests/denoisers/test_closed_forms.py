import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tests.support.denoisers import SHAPE, build, random_images

from els_service.denoisers.banks import Bank, make_bank
from els_service.denoisers.base import make_query
from els_service.denoisers.closed_forms import GaussianDenoiser, WienerDenoiser
from els_service.denoisers.levels import from_alpha_bar, from_sigma, from_time
from els_service.denoisers.spectra import MAX_DIMENSIONS
from els_service.errors import InvalidArgumentError

Array = npt.NDArray[np.float64]
TIMES = [0.05, 0.3, 0.7, 1.0]


def by_precision(x: Array, a: float, s: float, mean: Array, covariance: Array) -> Array:
    """The mean of N(mean, covariance)·N(x; a·x0, s²) by normal equations, all in float64.

    Independent of gains and spectra: (C + s²/a²)⁻¹ by a dense solve.
    """
    noisy = covariance + (s / a) ** 2 * np.eye(len(mean))
    return mean + covariance @ np.linalg.solve(noisy, x / a - mean)


def relative_error(got: torch.Tensor, want: Array) -> float:
    return float(np.linalg.norm(got.double().numpy().ravel() - want) / np.linalg.norm(want))


def test_gaussian_minimises_the_posterior_energy() -> None:
    mean, variance = random_images(SHAPE, 1), random_images(SHAPE, 2).square() + 0.01
    x = random_images((4, *SHAPE), 5)
    level = from_time(TIMES)
    got = GaussianDenoiser(SHAPE, mean, variance).denoise(make_query(x, level)).mean.double()
    a, s = (torch.tensor(values)[:, None, None, None] for values in (level.a, level.s))
    # ∂/∂D of ‖x - a·D‖²/2s² + (D - μ)²/2v must be 0; times v it is a few eps32 of its terms.
    pull, rest = variance * a * (x - a * got) / s**2, got - mean
    slack = 4 * torch.finfo(torch.float32).eps * (1 + variance * a * a / s**2) * (1 + x.abs() / a)
    assert ((pull - rest).abs() <= slack).all()


@pytest.mark.parametrize("sigma", [1e-4, 1.0, 1e6])
def test_gaussian_goes_from_the_image_to_the_mean_as_noise_grows(sigma: float) -> None:
    denoiser = GaussianDenoiser(SHAPE, torch.tensor(0.25), torch.tensor(1.0))
    x = random_images((1, *SHAPE))
    got = denoiser.denoise(make_query(x, from_sigma([sigma]))).mean
    torch.testing.assert_close(got, 0.25 + (x - 0.25) / (1 + sigma**2))


def test_gaussian_with_variance_0_knows_the_image_already() -> None:
    mean = random_images(SHAPE, 1)
    denoiser = GaussianDenoiser(SHAPE, mean, torch.tensor(0.0))
    got = denoiser.denoise(make_query(random_images((2, *SHAPE)), from_sigma([1e-4]))).mean
    assert torch.equal(got, mean.expand_as(got))


@pytest.mark.parametrize("size", [(), (1,), (5, 6), (2, 1, 1), SHAPE], ids=str)
def test_gaussian_broadcasts_mean_and_variance(size: tuple[int, ...]) -> None:
    mean, variance = random_images(size, 1), random_images(size, 2).square()
    query = make_query(random_images((2, *SHAPE)), from_sigma([0.3]))
    got = GaussianDenoiser(SHAPE, mean, variance).denoise(query).mean
    full = GaussianDenoiser(SHAPE, mean.expand(SHAPE), variance.expand(SHAPE))
    assert torch.equal(got, full.denoise(query).mean)


@pytest.mark.parametrize(
    ("mean", "variance", "message"),
    [
        (torch.zeros(3, 5, 6), torch.ones(()), r"mean: .*broadcasts to \[2, 5, 6\], got .*3, 5, 6"),
        (torch.zeros(1, 2, 5, 6), torch.ones(()), r"mean: expected .*, got shape \[1, 2, 5, 6\]"),
        (torch.zeros(()), torch.ones(5), r"variance: expected .*, got shape \[5\]"),
        (torch.zeros(()), torch.tensor(-1.0), "variance: expected >= 0, got -1.0"),
        (torch.tensor(math.nan), torch.ones(()), "mean: expected finite"),
        (torch.zeros(()), torch.tensor(math.inf), "variance: expected finite"),
    ],
)
def test_gaussian_refuses_a_prior_that_is_none(
    mean: torch.Tensor, variance: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianDenoiser(SHAPE, mean, variance)


@pytest.mark.parametrize("images", [1, 2, 9, 40], ids="{} images".format)
def test_wiener_is_dense_linear_algebra_on_the_banks_covariance(images: int) -> None:
    # 18 dimensions: more of them than images, and fewer.
    bank = make_bank(random_images((images, 2, 3, 3)).numpy())
    known = bank.pixels().double().flatten(1).numpy()
    mean, covariance = known.mean(0), np.cov(known.T, bias=True)
    x, level = random_images((4, 2, 3, 3), 5), from_time(TIMES)
    got = WienerDenoiser(bank).denoise(make_query(x, level)).mean
    for b in range(4):
        flat = x[b].double().numpy().ravel()
        want = by_precision(flat, level.a[b], level.s[b], mean, covariance)
        # Two float32 products over 18 axes of numbers below ‖x/a‖·λ/(λ+σ²), some ‖x‖ at most.
        assert relative_error(got[b], want) <= 18 * 1.2e-7


@pytest.mark.parametrize("label", [0, 2])
def test_wiener_restricts_mean_and_covariance_to_a_label(labelled: Bank, label: int) -> None:
    lo, hi = labelled.label_range(label)
    part = make_bank(labelled.images[lo:hi])
    query = make_query(random_images((3, *SHAPE), 5), from_time([0.1, 0.4, 0.9]), label)
    got = WienerDenoiser(labelled).denoise(query).mean
    want = WienerDenoiser(part).denoise(make_query(query.x, query.level)).mean
    assert torch.equal(got, want)


def test_wiener_answers_each_image_by_its_own_label(labelled: Bank) -> None:
    wiener = WienerDenoiser(labelled)
    x, labels = random_images((4, *SHAPE), 5), [2, -1, 0, 2]
    got = wiener.denoise(make_query(x, from_sigma([0.5]), labels)).mean
    for b, label in enumerate(labels):
        alone = wiener.denoise(make_query(x[b : b + 1], from_sigma([0.5]), label)).mean
        assert torch.equal(got[b], alone[0])


def test_wiener_of_one_image_returns_it() -> None:
    bank = make_bank(random_images((1, *SHAPE)).numpy())
    query = make_query(random_images((2, *SHAPE), 5), from_sigma([1e-4, 10.0]))
    got = WienerDenoiser(bank).denoise(query).mean
    torch.testing.assert_close(got, bank.pixels().expand_as(got), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["gaussian", "wiener"])
def test_preserving_and_exploding_variance_are_one_problem(labelled: Bank, kind: str) -> None:
    denoiser, x = build(kind, labelled), random_images((3, *SHAPE), 5)
    preserving = from_alpha_bar([0.01, 0.5, 0.99])
    scaled = (x.double() / torch.tensor(preserving.a)[:, None, None, None]).float()
    got = denoiser.denoise(make_query(scaled, from_sigma(preserving.sigma))).mean
    want = denoiser.denoise(make_query(x, preserving)).mean
    # A rounding of x/√ᾱ, at most 10 here: some eps32 of it in the answer.
    torch.testing.assert_close(got, want, rtol=0, atol=10 * 1.2e-7)


def test_wiener_is_refused_above_4096_dimensions() -> None:
    largest = make_bank(np.zeros((2, 1, 64, 64), np.uint8))
    assert math.prod(largest.shape) == MAX_DIMENSIONS
    WienerDenoiser(largest)
    with pytest.raises(ValueError, match="expected at most 4096 dimensions, got 4160"):
        WienerDenoiser(make_bank(np.zeros((2, 1, 65, 64), np.uint8)))


@pytest.mark.parametrize("kind", ["gaussian", "wiener"])
def test_closed_forms_have_neither_windows_nor_evidence(labelled: Bank, kind: str) -> None:
    denoiser = build(kind, labelled)
    query = make_query(random_images((1, *SHAPE)), from_sigma([1.0]))
    denoiser.check(query)
    assert denoiser.denoise(query).log_evidence is None
    assert (denoiser.info.kind, denoiser.info.has_log_evidence) == (kind, False)
    with pytest.raises(InvalidArgumentError, match="windows: expected none for a model without"):
        denoiser.check(make_query(query.x, query.level, windows=3))


def test_wiener_has_the_banks_labels_and_gaussian_none(labelled: Bank) -> None:
    x, level = random_images((1, *SHAPE)), from_sigma([1.0])
    wiener, gaussian = build("wiener", labelled), build("gaussian", labelled)
    wiener.check(make_query(x, level, 2))
    assert wiener.info.label_names == ("shirt", "none", "boot")
    with pytest.raises(InvalidArgumentError, match="label: expected a label with images"):
        wiener.check(make_query(x, level, 1))
    with pytest.raises(InvalidArgumentError, match="labels: expected none for an unlabelled"):
        gaussian.check(make_query(x, level, 0))


def test_a_new_label_is_predicted_to_take_longer_than_a_known_one(labelled: Bank) -> None:
    wiener = WienerDenoiser(labelled)
    query = make_query(random_images((1, *SHAPE)), from_sigma([1.0]), 0)
    fresh = wiener.predict_seconds(query)
    wiener.denoise(query)
    assert 0 < wiener.predict_seconds(query) < fresh


def test_gaussian_is_predicted_to_take_longer_for_more_images(labelled: Bank) -> None:
    gaussian = build("gaussian", labelled)
    one, many = (make_query(torch.zeros(n, *SHAPE), from_sigma([1.0])) for n in (1, 64))
    assert 0 < gaussian.predict_seconds(one) < gaussian.predict_seconds(many)
