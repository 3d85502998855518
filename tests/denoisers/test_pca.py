"""PCA-locality beside its formula in float64: means, evidence, products, masks, rejections."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tests.support.denoisers import random_images

from els_service.denoisers.banks import Bank, make_bank
from els_service.denoisers.base import Query, make_query
from els_service.denoisers.levels import from_alpha_bar, from_sigma
from els_service.denoisers.pca import Covariance, PcaDenoiser
from els_service.denoisers.pca_masks import RULES, Rule, ThresholdTable, mask_of
from els_service.denoisers.pca_tiles import TiledMask, tile_order, tile_sizes
from els_service.denoisers.spectra import spectrum_of
from els_service.errors import InvalidArgumentError

Array = npt.NDArray[np.float64]
SHAPE = (2, 10, 9)
SIZE = 180
EPS = 2.0**-24
ALPHA_BAR = [0.97, 0.6, 0.05]


@pytest.fixture(scope="module")
def bank() -> Bank:
    """Blurred images of two labels, with a pixel that never changes and one that hardly does."""
    fine = random_images((60, *SHAPE), 3)
    images = torch.nn.functional.avg_pool2d(fine, 3, 1, 1, count_include_pad=False).clamp(-0.9, 0.9)
    images[:, 0, 0, 0] = -1
    images[:, 1, 9, 8] = 0.5
    images[7, 1, 9, 8] += 1e-3
    return make_bank(images.numpy(), np.arange(60) % 2)


def formula_mask(images: Array, sigma: float, tau: float, rule: Rule) -> npt.NDArray[np.bool_]:
    """The mask of the paper, by a dense solve in place of eigenvectors."""
    covariance = np.cov(images.T)
    wiener = np.linalg.solve(covariance + sigma**2 * np.eye(SIZE), covariance)
    joins = np.diag(covariance) > 1e-4 * np.diag(covariance).mean()
    diagonal = np.where(joins, np.diag(wiener), 1)
    scale = diagonal[:, None]
    if rule == "correlation":
        scale = np.sqrt(diagonal[:, None] * diagonal)
    ratio = np.where(joins[:, None] & joins, np.abs(wiener / scale), 0)
    threshold = tau * (ratio.max() if rule == "released" else 1)
    # No entry is so close to the threshold that rounding decides.
    assert np.abs(ratio[ratio > 0] / threshold - 1).min() > 1e-9
    found: npt.NDArray[np.bool_] = (ratio >= threshold) & joins[:, None] & joins
    return found


def formula(
    images: Array, z: Array, sigma: float, mask: npt.NDArray[np.bool_]
) -> tuple[Array, Array, Array]:
    """Weights [N, D], means [D] and evidences [D] in float64, as the formula has them."""
    logits = -np.square(z - images) @ mask / (2 * sigma**2)
    evidence = np.logaddexp.reduce(logits, axis=0)
    weights = np.exp(logits - evidence)
    return weights, (weights * images).sum(0), evidence


def budget(images: Array, z: Array, sigma: float, mask: npt.NDArray[np.bool_]) -> Array:
    """Largest error of a logit: a rounding for each term of its sum, and a few of each term."""
    centred, y = images - images.mean(0), z - images.mean(0)
    terms = np.abs(centred) * (np.abs(centred) + 2 * np.abs(y)) @ mask
    found: Array = (mask.sum(0) + 8) * EPS * terms.max(0) / (2 * sigma**2)
    return found


def noisy(count: int = 3) -> Query:
    level = from_alpha_bar(ALPHA_BAR[:count])
    a, s = (torch.tensor(of)[:, None, None, None] for of in (level.a, level.s))
    x = a * random_images((count, *SHAPE), 11) + s * random_images((count, *SHAPE), 12) * 2
    return make_query(x.float(), level, [-1, 0, 1][:count])


def known(bank: Bank, label: int) -> Array:
    return bank.pixels().double().flatten(1).numpy()[slice(*bank.label_range(label))]


@pytest.mark.parametrize(("rule", "tau"), [("correlation", 0.1), ("released", 0.02)])
@pytest.mark.parametrize("covariance", ["label", "all"])
def test_means_and_evidence_are_those_of_the_formula(
    bank: Bank, rule: Rule, tau: float, covariance: Covariance
) -> None:
    table = ThresholdTable.constant(tau)
    machine = PcaDenoiser(bank, rule=rule, threshold=table, covariance=covariance)
    query = noisy()
    got = machine.denoise(query)
    for i, label in enumerate(query.labels.tolist()):
        images = known(bank, label)
        z, sigma = query.pixels[i].ravel() / query.level.a[i], float(query.level.sigma[i])
        mask = formula_mask(images if covariance == "label" else known(bank, -1), sigma, tau, rule)
        assert 0 < mask.mean() < 0.9
        _, mean, evidence = formula(images, z, sigma, mask)
        error = budget(images, z, sigma, mask)
        # Weights are off by a factor within exp(±2·error).
        reach = np.expm1(2 * error) * np.ptp(images, axis=0) + 4 * EPS
        assert (np.abs(got.pixels[i].ravel() - mean) <= reach).all()
        assert got.log_evidence is not None
        by_pixel = evidence.reshape(SHAPE).sum(0)
        slack = (2 * error).reshape(SHAPE).sum(0) + 8 * EPS * np.abs(by_pixel)
        assert (np.abs(got.log_evidence[i] - by_pixel) <= slack).all()


def test_a_softmax_within_each_batch_of_images_is_another_machine(bank: Bank) -> None:
    query = noisy(1)
    machine = PcaDenoiser(bank)
    z, sigma = query.pixels[0].ravel() / query.level.a[0], float(query.level.sigma[0])
    images = known(bank, -1)
    mask = formula_mask(images, sigma, 0.1, "correlation")
    halves = [formula(half, z, sigma, mask)[1] for half in np.split(images, 2)]
    got = machine.denoise(query).pixels.ravel()
    reach = np.expm1(2 * budget(images, z, sigma, mask)) * np.ptp(images, axis=0) + 4 * EPS
    off = np.abs(got - np.mean(halves, axis=0))
    assert (off > 10 * reach).mean() > 0.5


@pytest.mark.parametrize("rule", RULES)
def test_products_are_those_of_the_jacobian_of_the_formula(bank: Bank, rule: Rule) -> None:
    machine = PcaDenoiser(bank, rule=rule)
    query, along = noisy(), random_images((3, *SHAPE), 13).numpy()
    vjp, jvp = machine.vjp(query, along), machine.jvp(query, along)
    np.testing.assert_array_equal(vjp.mean, machine.denoise(query).pixels)
    for i, label in enumerate(query.labels.tolist()):
        images, sigma = known(bank, label), float(query.level.sigma[i])
        z, direction = query.pixels[i].ravel() / query.level.a[i], along[i].ravel().astype(float)
        mask = formula_mask(images, sigma, 0.1, rule)
        weights, mean, _ = formula(images, z, sigma, mask)
        # ∂D[m]/∂x[n] = M[n, m] Σ_v w_v(m) (v[m] - D[m]) v[n] / (a σ²)
        jacobian = (weights * (images - mean)).T @ images * mask.T
        jacobian /= query.level.a[i] * sigma**2
        for got, want in (
            (vjp.product[i].ravel(), direction @ jacobian),
            (jvp.product[i].ravel(), jacobian @ direction),
        ):
            error = np.expm1(4 * budget(images, z, sigma, mask)).max() + SIZE * EPS
            scale = np.abs(weights * (images - mean)).sum(0).max() * np.ptp(images) * SIZE
            assert np.abs(got - want).max() <= error * scale / (query.level.a[i] * sigma**2)
            assert np.linalg.norm(got - want) <= 1e-3 * np.linalg.norm(want)


def test_an_image_has_the_same_bits_alone_and_in_a_batch(bank: Bank) -> None:
    query, along = noisy(), random_images((3, *SHAPE), 14).numpy()
    together, product = PcaDenoiser(bank).denoise(query), PcaDenoiser(bank).vjp(query, along)
    for i in (2, 0, 1):
        alone = PcaDenoiser(bank)
        np.testing.assert_array_equal(alone.denoise(query[i : i + 1]).pixels[0], together.pixels[i])
        one = alone.vjp(query[i : i + 1], along[i : i + 1]).product
        np.testing.assert_array_equal(one[0], product.product[i])


def test_pixels_without_variance_join_no_mask_and_are_the_mean(bank: Bank) -> None:
    for rule in RULES:
        images = torch.from_numpy(known(bank, -1))
        mask = mask_of(spectrum_of(images), 0.5, 0.05, rule)
        for still in (0, SIZE - 1):
            assert not mask[still].any()
            assert not mask[:, still].any()
        answer = PcaDenoiser(bank, rule=rule).denoise(noisy(1)).pixels[0].ravel()
        assert answer[0] == pytest.approx(-1)
        assert answer[-1] == pytest.approx(0.5 + 1e-3 / 60, abs=1e-6)


def test_masks_of_correlation_are_symmetric_and_one_threshold_means_the_same_everywhere(
    bank: Bank,
) -> None:
    spectrum = spectrum_of(torch.from_numpy(known(bank, -1)))
    for sigma in (1e-3, 1.0, 1e3):
        mask = mask_of(spectrum, sigma, 1.0, "correlation")
        assert torch.equal(mask, torch.diag(mask.diagonal())), "of 1, each by itself"
        mask = mask_of(spectrum, sigma, 0.1, "correlation")
        assert torch.equal(mask, mask.T)


@pytest.mark.parametrize("share", [0.002, 0.9])
def test_sums_by_tiles_are_those_of_the_whole_mask(share: float) -> None:
    shape = (2, 17, 9)
    size, sizes = 2 * 17 * 9, tile_sizes(shape)
    assert sorted(tile_order(shape).tolist()) == list(range(size))
    assert sum(sizes) == size
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(size, size, generator=generator) < share
    tiled = TiledMask(mask, sizes, "cpu")
    values = torch.randint(-8, 9, (5, size), generator=generator).float()
    assert torch.equal(tiled.sums(values), values @ mask.float())
    assert torch.equal(tiled.sums(values[0].double()), values[0].double() @ mask.double())
    assert torch.equal(tiled.transposed_sums(values), values @ mask.float().T)


def test_a_mask_of_everything_is_the_ideal_machine_over_those_that_change(bank: Bank) -> None:
    query = noisy(1)
    machine = PcaDenoiser(bank, threshold=ThresholdTable.constant(1e-9))
    images, sigma = known(bank, -1), float(query.level.sigma[0])
    z = query.pixels[0].ravel() / query.level.a[0]
    change = np.ptp(images, axis=0) > 0.1
    logits = -np.square(z - images)[:, change].sum(1) / (2 * sigma**2)
    weights = np.exp(logits - np.logaddexp.reduce(logits))
    got = machine.denoise(query).pixels[0].ravel()
    np.testing.assert_allclose(got[change], (weights @ images)[change], atol=1e-4)


def test_thresholds_are_interpolated_by_level_and_calibrated_ones_share_the_bank(
    bank: Bank,
) -> None:
    table = ThresholdTable((0.1, 10.0), (0.01, 1.0))
    assert table.at(np.array([0.01, 0.1, 1.0, 10.0, 99.0])).tolist() == [0.01, 0.01, 0.1, 1.0, 1.0]
    machine = PcaDenoiser(bank, threshold=table)
    query = make_query(random_images((1, *SHAPE), 5), from_sigma([1.0]))
    constant = machine.with_threshold(0.1)
    assert constant.spectra is machine.spectra
    np.testing.assert_array_equal(constant.denoise(query).pixels, machine.denoise(query).pixels)


@pytest.mark.parametrize(
    ("sigma", "tau", "message"),
    [
        ((), (), "threshold: expected as many tau as sigma, at least one, got 0 tau and 0 sigma"),
        ((1.0,), (0.1, 0.2), "threshold: expected as many tau as sigma"),
        ((2.0, 1.0), (0.1, 0.1), "threshold.sigma: expected increasing, finite and > 0"),
        ((1.0,), (0.0,), "threshold.tau: expected above 0, at most 1, got 0.0"),
        ((1.0,), (1.5,), "threshold.tau: expected above 0, at most 1, got 1.5"),
        ((1.0,), (float("nan"),), "threshold.tau: expected above 0, at most 1, got nan"),
    ],
)
def test_what_is_no_threshold_is_rejected(
    sigma: tuple[float, ...], tau: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ThresholdTable(sigma, tau)


def test_banks_and_labels_that_have_no_covariance_are_rejected() -> None:
    pixels = np.zeros((3, 1, 4, 4), np.uint8)
    with pytest.raises(ValueError, match="bank: expected at least 2 images, got 1"):
        PcaDenoiser(make_bank(pixels[:1]))
    with pytest.raises(ValueError, match="expected at most 4096 dimensions, got 4160"):
        PcaDenoiser(make_bank(np.zeros((2, 1, 65, 64), np.uint8)))
    bank = make_bank(pixels, np.array([0, 0, 1]))
    query = make_query(torch.zeros(1, 1, 4, 4), from_sigma([1.0]), 1)
    with pytest.raises(InvalidArgumentError, match="label: expected one with at least 2 images"):
        PcaDenoiser(bank).check(query)
    machine = PcaDenoiser(bank, covariance="all")
    machine.check(query)
    # Images that are all alike are the answer, at any noise.
    assert (machine.denoise(query).pixels == -1).all()
    with pytest.raises(InvalidArgumentError, match="windows: expected none"):
        machine.check(make_query(query.x, query.level, windows=3))


def test_a_new_level_is_predicted_to_take_longer_than_a_known_one(bank: Bank) -> None:
    machine, query = PcaDenoiser(bank), noisy(1)
    fresh = machine.predict_seconds(query)
    machine.denoise(query)
    assert 0 < machine.predict_seconds(query) < fresh
    assert machine.predict_product_seconds(query, "vjp") > machine.predict_seconds(query)
