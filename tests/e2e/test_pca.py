"""PCA-locality and smoothed closed forms from a real server, beside the denoiser itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.explained import images
from tests.support.models_folder import write_models
from tests.support.processes import serving

from els_client import Client, ElsError
from els_service.denoisers.answers import score_array
from els_service.denoisers.base import Denoiser, make_query
from els_service.denoisers.gradients import Differentiable
from els_service.denoisers.levels import from_sigma
from els_service.denoisers.samplers import Options, sample
from els_service.repository import ModelRepository

_BANK = "bank: ../_banks/tiny.safetensors\n"
DOCUMENTS = {
    "pca": f"kind: pca\n{_BANK}",
    "smoothed": f"kind: smoothed\nsmoothing: 0.2\ndraws: 3\n{_BANK}",
    "released": f"kind: pca\nrule: released\nthreshold: 0.02\ncovariance: all\n{_BANK}",
}
SIGMAS = [0.3, 2.0]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models") / "root", DOCUMENTS)


@pytest.fixture(scope="module")
def client(root: Path) -> Iterator[Client]:
    with serving("--models", root, "--threads", 1) as server, Client(server.target) as client:
        yield client


@pytest.fixture(params=DOCUMENTS)
def served(root: Path, request: pytest.FixtureRequest) -> tuple[str, Denoiser]:
    return request.param, ModelRepository(root).load(request.param)


def test_answers_scores_and_evidence_have_the_bits_of_the_denoiser(
    client: Client, served: tuple[str, Denoiser]
) -> None:
    name, denoiser = served
    x = np.concatenate([images(1), images(2)])[:2]
    query = make_query(x, from_sigma(SIGMAS), [1, -1])
    want = denoiser.denoise(query)
    options: dict[str, Any] = {"model": name, "sigma": SIGMAS, "label": [1, -1]}
    got, evidence = client.denoise_with_evidence(x, **options)
    np.testing.assert_array_equal(got, want.pixels)
    np.testing.assert_array_equal(evidence, want.log_evidence)
    np.testing.assert_array_equal(client.score(x, **options), score_array(query, want.pixels))


def test_products_and_samples_are_those_of_the_denoiser(
    client: Client, served: tuple[str, Denoiser]
) -> None:
    name, denoiser = served
    assert isinstance(denoiser, Differentiable)
    x, along = images(1)[:1], images(3)[:1]
    query = make_query(x, from_sigma([1.0]), 2)
    for method in ("vjp", "jvp"):
        want = getattr(denoiser, method)(query, along)
        mean, product = getattr(client, method)(x, along, model=name, sigma=1.0, label=2)
        np.testing.assert_array_equal(mean, want.mean)
        np.testing.assert_array_equal(product, want.product)
    *_, step = client.sample(model=name, seed=4, steps=3)
    *_, last = sample(denoiser, count=1, seed=4, options=Options(steps=3))
    np.testing.assert_array_equal(step.denoised, last.denoised.float().numpy())


def test_what_the_kind_does_not_have_is_rejected_by_name(client: Client) -> None:
    assert (client.model("pca").kind, client.model("pca").has_gradients) == ("pca", True)
    assert not client.model("pca").has_sources
    with pytest.raises(ElsError, match="windows: expected none for a model without a window"):
        client.denoise(images(1), model="pca", sigma=1.0, window=3)
    for kind in ("pca", "smoothed"):
        with pytest.raises(ElsError, match=f"{kind} has no sources to name"):
            client.explain(images(1), model=kind, sigma=1.0)
