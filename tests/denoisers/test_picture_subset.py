"""A part of the patches of large pictures: which they are, and how far their answer is off."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.denoisers.test_picture import PATCH, RHO, bank, denoiser, picture
from tests.support import picture_reference

from els_kernels import MAX_SOURCES, FoldedAttention
from els_service.denoisers.base import make_query
from els_service.denoisers.levels import MAX_SIGMA, NoiseLevel, from_sigma
from els_service.denoisers.picture_banks import PictureBank
from els_service.denoisers.picture_subset import (
    PROBED,
    PatchSubset,
    SubsetDenoiser,
    all_patches,
    patch_subset,
)

WHOLE = bank(picture(40, 44), picture(33, 44))


def scales_of(whole: PictureBank) -> list[tuple[torch.Tensor, ...]]:
    return [whole.images[slice(*whole.label_range(label))] for label in range(len(whole.sizes))]


def subset_of(sources: int, seed: int = 0) -> PatchSubset:
    return patch_subset(scales_of(WHOLE), patch=PATCH, sources=sources, seed=seed)


def model(sources: int, seed: int = 0) -> SubsetDenoiser:
    subset = subset_of(sources, seed)
    return SubsetDenoiser(
        denoiser(WHOLE), all_patches(scales_of(WHOLE)), subset, FoldedAttention(subset.images),
        patch=PATCH, fold=RHO, name=f"{sources} {seed}",
    )  # fmt: skip


def query(sigma: float, label: int = 1) -> tuple[torch.Tensor, NoiseLevel, int]:
    noise = torch.randn(3, 12, 14, generator=torch.Generator().manual_seed(0))
    return (picture(12, 14) + sigma * noise)[None], from_sigma([sigma]), label


def test_a_subset_is_drawn_by_its_seed_and_has_at_most_so_many_patches() -> None:
    exact = model(10**6).counts
    assert exact[1] == 36 * 40 + 29 * 40
    for sources in (400, 800, 1600):
        counts = model(sources).counts
        assert counts[0] == exact[0]
        # Strips have 10 rows of 40 patches, or what is left of a picture.
        assert sources - 400 < counts[1] <= sources
    assert model(1).counts[1] > 0
    first, again, other = (subset_of(800, seed) for seed in (1, 1, 2))
    for one, two in zip(first.images, again.images, strict=True):
        assert torch.equal(one, two)
    assert [im.sum() for im in first.images] != [im.sum() for im in other.images]


@pytest.mark.parametrize("label", [-1, 0, 1])
def test_the_answer_is_that_of_the_patches_of_the_subset(label: int) -> None:
    x, level, _ = query(0.5)
    subset = subset_of(800)
    mean = model(800).denoise(make_query(x, level, label)).mean[0].double()
    images = subset.images[slice(*subset.of(label))]
    expected = picture_reference.denoise(x[0], images, 1.0, 0.5, PATCH, RHO)
    assert (mean - expected).norm() < 2e-5 * expected.norm()


def test_all_patches_and_the_uniform_posterior_have_the_bits_of_the_exact_model() -> None:
    exact = denoiser(WHOLE)
    for sources, sigma in ((10**6, 0.5), (400, MAX_SIGMA)):
        asked = make_query(*query(sigma))
        found = model(sources).denoise(asked).pixels
        np.testing.assert_array_equal(found, exact.denoise(asked).pixels)


@pytest.mark.slow
def test_errors_are_printed_as_they_are_and_fall_with_more_patches() -> None:
    few, many, every = (model(sources).errors() for sources in (400, 1600, 10**6))
    assert len(few) == len(PROBED)
    assert sum(many) < sum(few)
    assert every == [0.0] * len(PROBED)


def test_the_prediction_falls_with_the_number_of_patches() -> None:
    asked = make_query(torch.zeros(1, 3, 40, 44), from_sigma([1.0]), 1)
    few, every = model(400).predict_seconds(asked), model(10**6).predict_seconds(asked)
    assert every == denoiser(WHOLE).predict_seconds(asked)
    assert few < 0.5 * every


@pytest.mark.parametrize("label", [0, 1])
def test_sources_of_a_subset_are_pixels_of_the_whole_pictures(label: int) -> None:
    part, asked = model(800), make_query(*query(0.1, label))
    found = part.explain(asked, MAX_SOURCES)
    np.testing.assert_allclose(found.pixels, part.denoise(asked).pixels, atol=1e-5)
    lo, hi = WHOLE.label_range(label)
    assert found.shares[0, lo:hi].sum() == pytest.approx(1)
    assert found.shares.shape == (1, len(WHOLE))
    image, row, column = np.moveaxis(found.sources[0], -1, 0)
    rebuilt = np.zeros(found.pixels.shape[1:])
    for place in np.ndindex(image.shape):
        if image[place] >= 0:
            pixel = WHOLE.image(image[place])[:, row[place], column[place]]
            rebuilt[:, place[0], place[1]] += found.weights[0][place] * pixel
    missing = 1 - found.weights[0].sum(-1)
    assert missing.mean() < 0.5
    assert (np.abs(rebuilt - found.pixels[0]) <= missing + 1e-5).all()
    if label == 1:
        subset = subset_of(800)
        kept = {
            (index, first + offset)
            for (index, first), part_of in zip(subset.origins, subset.images, strict=True)
            for offset in range(part_of.shape[1])
        }
        used = image >= 0
        assert set(zip(image[used].tolist(), row[used].tolist(), strict=True)) <= kept


def test_a_source_that_is_missing_remains_so_and_products_are_adjoint() -> None:
    part, asked = model(1), make_query(*query(1e-3))
    found = part.explain(asked, MAX_SOURCES)
    none = found.sources[..., 0] < 0
    assert (found.sources[none] == -1).all()
    np.testing.assert_array_equal(part.variance(asked), found.variance)
    g, u = np.random.default_rng(0).normal(size=(2, *asked.pixels.shape)).astype(np.float32)
    asked = make_query(*query(0.5))
    left = float((part.vjp(asked, g).product.astype(np.float64) * u).sum())
    right = float((part.jvp(asked, u).product.astype(np.float64) * g).sum())
    assert left == pytest.approx(right, rel=1e-4)


def test_the_bank_of_a_subset_has_the_fingerprint_of_the_model() -> None:
    part, exact = model(800), denoiser(WHOLE)
    assert part.info.bank is not None
    assert part.bank.fingerprint == part.info.bank.fingerprint != exact.bank.fingerprint
    assert part.info.has_sources
    few = part.predict_explain_seconds(make_query(*query(0.5)))
    assert few < exact.predict_explain_seconds(make_query(*query(0.5)))
