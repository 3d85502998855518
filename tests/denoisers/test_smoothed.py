"""Smoothed closed forms beside the formula in float64."""

from __future__ import annotations

import numpy as np
import pytest
from tests.support.denoisers import SHAPE, random_images

from els_kernels import PatchAttention
from els_service.denoisers.analytic import AnalyticDenoiser
from els_service.denoisers.banks import Bank
from els_service.denoisers.base import make_query
from els_service.denoisers.levels import from_alpha_bar, from_sigma
from els_service.denoisers.noise import standard_normal
from els_service.denoisers.smoothed import SmoothedDenoiser

SIZE = int(np.prod(SHAPE))


def ideal(bank: Bank, machine: str = "ideal") -> AnalyticDenoiser:
    return AnalyticDenoiser(PatchAttention(bank.pixels()), bank, machine=machine)


def test_answers_are_the_mean_of_barycentres_of_the_paper(labelled: Bank) -> None:
    # In the paper's variables: z = t·x0 + (1 - t)·noise, k(z) = Σ softmax(-‖z - t·v‖²/2(1-t)²) t·v.
    smoothing, draws = 0.15, 5
    machine = SmoothedDenoiser(ideal(labelled), smoothing=smoothing, draws=draws, seed=3)
    level = from_alpha_bar([0.9, 0.5, 0.1])
    query = make_query(random_images((3, *SHAPE), 4), level, [0, 2, -1])
    along = random_images((3, *SHAPE), 5).numpy()
    got, vjp, jvp = machine.denoise(query), machine.vjp(query, along), machine.jvp(query, along)
    for i, label in enumerate(query.labels.tolist()):
        images = labelled.pixels().double().flatten(1).numpy()[slice(*labelled.label_range(label))]
        t, sigma = 1 / (1 + level.sigma[i]), level.sigma[i]
        z = t * query.pixels[i].ravel().astype(float) / level.a[i]
        mean, jacobian, evidence = np.zeros(SIZE), np.zeros((SIZE, SIZE)), 0.0
        for m in range(draws):
            at = z + smoothing * standard_normal(3, m, 0, SIZE)
            logits = -np.square(at - t * images).sum(1) / (2 * (1 - t) ** 2)
            evidence += np.logaddexp.reduce(logits) / draws
            weights = np.exp(logits - np.logaddexp.reduce(logits))
            each = weights @ images
            mean += each / draws
            centred = images - each
            jacobian += (centred.T * weights) @ centred / (draws * level.a[i] * sigma**2)
        np.testing.assert_allclose(got.pixels[i].ravel(), mean, atol=2e-5)
        assert got.log_evidence is not None
        np.testing.assert_allclose(got.log_evidence[i], evidence, rtol=1e-5)
        direction, slack = along[i].ravel() @ jacobian, 1e-4 * np.abs(jacobian).max()
        for product in (vjp.product[i], jvp.product[i]):
            np.testing.assert_allclose(product.ravel(), direction, atol=slack)
    np.testing.assert_array_equal(vjp.mean, jvp.mean)


def test_without_smoothing_it_is_the_ideal_machine(labelled: Bank) -> None:
    query = make_query(random_images((2, *SHAPE), 4), from_sigma([0.3, 3.0]))
    got = SmoothedDenoiser(ideal(labelled), smoothing=0.0, draws=2).denoise(query)
    np.testing.assert_allclose(got.pixels, ideal(labelled).denoise(query).pixels, atol=1e-7)


def test_what_cannot_be_smoothed_is_rejected(labelled: Bank) -> None:
    for smoothing, draws, message in (
        (-1.0, 1, "smoothing: expected 0 or more, finite, got -1.0"),
        (float("nan"), 1, "smoothing: expected 0 or more, finite, got nan"),
        (1.0, 0, "draws: expected 1 to 1024, got 0"),
        (1.0, 1025, "draws: expected 1 to 1024, got 1025"),
    ):
        with pytest.raises(ValueError, match=message):
            SmoothedDenoiser(ideal(labelled), smoothing=smoothing, draws=draws)
    with pytest.raises(ValueError, match="machine: expected ideal, got local"):
        SmoothedDenoiser(ideal(labelled, "local"), smoothing=1.0, draws=1)
