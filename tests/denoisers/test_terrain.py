"""A denoiser that nobody here wrote: the terrain UNet, fetched by ``make terrain``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from els_service.denoisers.answers import score
from els_service.denoisers.base import Denoiser, make_query
from els_service.denoisers.levels import from_alpha_bar, from_sigma
from els_service.denoisers.samplers import Options, sample
from els_service.repository import ModelRepository

FETCHED = Path(__file__).parents[2] / ".terrain" / "terrain.onnx"
DOCUMENT = """
kind: onnx
file: terrain.onnx
input: noisy
output: denoised
level: {input: sigma, as: sigma, range: [0.002, 80.0]}
constants: {difficulty: 0.5}
"""

# 38 MB to fetch, which not every run of the tests should.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FETCHED.exists(), reason="needs a network of 38 MB: make terrain"),
]


@pytest.fixture(scope="module")
def terrain(tmp_path_factory: pytest.TempPathFactory) -> Denoiser:
    root = tmp_path_factory.mktemp("models")
    (root / "terrain").mkdir()
    (root / "terrain" / "model.yaml").write_text(DOCUMENT)
    (root / "terrain" / "terrain.onnx").hardlink_to(FETCHED)
    return ModelRepository(root).load("terrain")


def test_it_answers_what_the_graph_itself_answers(terrain: Denoiser) -> None:
    assert terrain.info.shape == (1, 128, 128)
    sigma = np.array([0.05, 1.0, 80.0], np.float32)
    x = torch.randn(3, 1, 128, 128) * torch.from_numpy(sigma).view(-1, 1, 1, 1)
    got = terrain.denoise(make_query(x, from_sigma(sigma.tolist()))).pixels
    graph = onnxruntime.InferenceSession(FETCHED, providers=["CPUExecutionProvider"])
    difficulty = np.full(3, 0.5, np.float32)
    inputs = {"noisy": x.numpy(), "sigma": sigma, "difficulty": difficulty}
    (want,) = graph.run(["denoised"], inputs)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_both_conventions_ask_the_same(terrain: Denoiser) -> None:
    x = torch.randn(1, 1, 128, 128) * 2
    alpha_bar = 1 / (1 + 2.0**2)
    exploding = terrain.denoise(make_query(x, from_sigma([2.0]))).mean
    preserving = make_query(x * alpha_bar**0.5, from_alpha_bar([alpha_bar]))
    torch.testing.assert_close(terrain.denoise(preserving).mean, exploding, rtol=1e-4, atol=1e-5)
    assert score(preserving, exploding).isfinite().all()


def test_it_draws_terrain(terrain: Denoiser) -> None:
    # It was distilled to draw in one step.
    *_, last = sample(terrain, count=2, options=Options(steps=1))
    for (image,) in last.x:
        assert 0.02 < float(image.std()) < 1
        # Land is smooth: neighbours are far closer to each other than pixels in general.
        assert float((image[1:] - image[:-1]).std()) < 0.5 * float(image.std())
