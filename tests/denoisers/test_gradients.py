"""Jacobian products of every kind of denoiser, and the sources of analytic ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.denoisers.test_batch_invariance import POOL, pool
from tests.support import networks
from tests.support.denoisers import SHAPE, random_images

from els_service.denoisers.base import Denoiser, Query, concatenate, make_query
from els_service.denoisers.explanations import Explainable
from els_service.denoisers.gradients import Differentiable, Direction
from els_service.denoisers.levels import from_alpha_bar, from_sigma
from els_service.denoisers.originality import HasBank
from els_service.engine.batching import INLINE_S


def product(
    denoiser: object, query: Query, along: np.ndarray[Any, Any], kind: Direction
) -> np.ndarray[Any, Any]:
    assert isinstance(denoiser, Differentiable)
    answer = denoiser.vjp(query, along) if kind == "vjp" else denoiser.jvp(query, along)
    return answer.product


def moved(query: Query, by: np.ndarray[Any, Any]) -> Query:
    return Query((query.pixels + by).astype(np.float32), query.level, query.labels, query.windows)


def test_every_kind_has_products_and_says_so(denoiser: Denoiser) -> None:
    assert isinstance(denoiser, Differentiable)
    assert denoiser.info.has_gradients
    assert denoiser.info.has_sources == isinstance(denoiser, Explainable)
    assert denoiser.info.has_originality == isinstance(denoiser, HasBank)


def test_jvp_is_the_difference_of_denoised_images(denoiser: Denoiser) -> None:
    query = make_query(random_images((2, *SHAPE), 5), from_sigma([0.5, 2.0]), [], [])
    u = random_images((2, *SHAPE), 6).numpy()
    step = 2e-3
    ahead, behind = (denoiser.denoise(moved(query, d * step * u)).pixels for d in (1, -1))
    got = product(denoiser, query, u, "jvp")
    # D is float32 here: its rounding, divided by the step; tests/kernels compare in float64.
    assert np.abs(got - (ahead - behind) / (2 * step)).max() <= 1e-3 * np.abs(got).max() + 2e-4


def test_vjp_is_the_adjoint_of_jvp(denoiser: Denoiser) -> None:
    query = make_query(random_images((2, *SHAPE), 5), from_alpha_bar([0.5, 0.9]), [], [])
    g, u = (random_images((2, *SHAPE), seed).numpy() for seed in (7, 8))
    left = (product(denoiser, query, g, "vjp") * u).sum((1, 2, 3))
    right = (g * product(denoiser, query, u, "jvp")).sum((1, 2, 3))
    assert left == pytest.approx(right, rel=1e-4, abs=1e-5)


def test_products_and_their_means_have_the_same_bits_alone_and_in_any_batch(
    denoiser: Denoiser,
) -> None:
    assert isinstance(denoiser, Differentiable)
    queries = pool(denoiser)
    along = random_images((POOL, *SHAPE), 9).numpy()
    for kind in (denoiser.vjp, denoiser.jvp):
        together = kind(concatenate(queries), along)
        for b, query in enumerate(queries):
            alone = kind(query, along[b : b + 1])
            assert np.array_equal(together.product[b], alone.product[0])
            assert np.array_equal(together.mean[b], alone.mean[0])


def test_the_mean_beside_a_product_is_what_denoise_returns(denoiser: Denoiser) -> None:
    assert isinstance(denoiser, Differentiable)
    query = concatenate(pool(denoiser))
    mean = denoiser.vjp(query, random_images((POOL, *SHAPE), 9).numpy()).mean
    want = denoiser.denoise(query).pixels
    assert np.linalg.norm(mean - want) <= 1e-4 * np.linalg.norm(want)
    assert denoiser.predict_product_seconds(query, "vjp") > 0


def test_products_of_a_machine_never_run_on_the_event_loop(denoiser: Denoiser) -> None:
    if not isinstance(denoiser, Explainable):
        return
    assert isinstance(denoiser, Differentiable)
    query = make_query(random_images((1, *SHAPE), 5), from_sigma([1.0]))
    assert denoiser.predict_product_seconds(query, "vjp") > INLINE_S
    assert denoiser.predict_product_seconds(query, "jvp") > INLINE_S
    assert denoiser.predict_explain_seconds(query) > INLINE_S


def test_an_explanation_weighs_images_of_the_label_alone(denoiser: Denoiser) -> None:
    if not isinstance(denoiser, Explainable):
        return
    x = random_images((3, *SHAPE), 5)
    query = make_query(x, from_sigma([0.3, 1.0, 3.0]), [-1, 0, 2])
    found = denoiser.explain(query, 4)
    assert found.shares.sum(1) == pytest.approx(np.ones(3), abs=1e-9)
    # The bank is sorted: five images of label 0, four of label 2.
    assert not found.shares[1, 5:].any()
    assert not found.shares[2, :5].any()
    want = denoiser.denoise(query).pixels
    assert np.linalg.norm(found.pixels - want) <= 1e-4 * np.linalg.norm(want)
    assert np.array_equal(found[1:2].sources[0], found.sources[1])
    assert denoiser.predict_explain_seconds(query) > 0


@pytest.mark.parametrize("architecture", networks.WIDTHS)
def test_a_networks_products_are_adjoint_and_match_differences(architecture: str) -> None:
    denoiser = networks.denoiser(networks.config(architecture))
    assert denoiser.info.has_gradients
    assert not denoiser.info.has_sources
    assert not denoiser.info.has_originality
    shape = (3, *networks.SHAPE)
    query = make_query(random_images(shape, 1), from_sigma([0.3, 1.0, 3.0]), [0, 1, -1])
    g, u = (random_images(shape, seed).numpy() for seed in (7, 8))
    # As on a device's thread, where tensors take no part in differentiation.
    with torch.inference_mode():
        pulled = denoiser.vjp(query, g)
        pushed = denoiser.jvp(query, u)
    assert np.array_equal(pulled.mean, pushed.mean)
    assert (pulled.product * u).sum((1, 2, 3)) == pytest.approx(
        (g * pushed.product).sum((1, 2, 3)), rel=1e-4, abs=1e-4
    )
    step = 1e-3
    ahead, behind = (denoiser.denoise(moved(query, d * step * u)).pixels for d in (1, -1))
    difference = (ahead - behind) / (2 * step)
    assert np.linalg.norm(pushed.product - difference) <= 1e-2 * np.linalg.norm(difference)


def test_a_deterministic_network_has_the_same_products_alone_and_in_a_batch() -> None:
    denoiser = networks.denoiser(networks.config(), deterministic=True)
    shape = (3, *networks.SHAPE)
    query = make_query(random_images(shape, 1), from_sigma([0.3, 1.0, 3.0]), [0, 1, -1])
    g = random_images(shape, 7).numpy()
    together = denoiser.vjp(query, g)
    for b in range(3):
        alone = denoiser.vjp(query[b : b + 1], g[b : b + 1])
        assert np.array_equal(alone.product[0], together.product[b])
