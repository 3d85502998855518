"""Classifier-free guidance by label, on networks with a class for no label."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support import networks, pretrained
from tests.support.denoisers import random_images

from els_service.denoisers.base import Denoiser, concatenate, make_query
from els_service.denoisers.closed_forms import GaussianDenoiser
from els_service.denoisers.levels import from_sigma
from els_service.denoisers.samplers import sample
from els_service.errors import InvalidArgumentError
from els_service.repository import ModelRepository

SIGMA = [0.3, 3.0, 10.0]
LABELS = [2, 0, 1]
GUIDANCE = [4.0, 1.0, -1.5]


@pytest.fixture(params=["network", "deterministic", "diffusers"])
def denoiser(request: pytest.FixtureRequest, tmp_path: Path) -> Denoiser:
    if request.param != "diffusers":
        return networks.denoiser(networks.config(), deterministic=request.param == "deterministic")
    folder = tmp_path / "model"
    parts = {"unet": pretrained.unet(num_class_embeds=4), "scheduler": pretrained.scheduler()}
    pretrained.write_folder(folder, "kind: diffusers\nnull_label: true\n", **parts)
    return ModelRepository(tmp_path).load("model")


def test_d_moves_from_no_label_past_the_label_by_each_image_s_guidance(denoiser: Denoiser) -> None:
    x = random_images((3, *denoiser.info.shape))
    level = from_sigma(SIGMA)
    given = denoiser.denoise(make_query(x, level, LABELS)).pixels
    without = denoiser.denoise(make_query(x, level)).pixels
    query = make_query(x, level, LABELS)
    query.guidance = np.array(GUIDANCE)
    denoiser.check(query)
    weight = query.guidance[:, None, None, None]
    want = without + weight * (given - without)
    assert np.abs(given - without).max() > 1e-4
    np.testing.assert_allclose(denoiser.denoise(query).pixels, want, rtol=1e-4, atol=1e-5)


def test_images_with_and_without_guidance_share_a_batch(denoiser: Denoiser) -> None:
    x = random_images((3, *denoiser.info.shape))
    plain, guided = (make_query(x, from_sigma(SIGMA), LABELS) for _ in range(2))
    guided.guidance = np.array(GUIDANCE)
    together = concatenate([plain, guided])
    assert together.guidance is not None
    assert together.guidance.tolist() == [1, 1, 1, *GUIDANCE]
    got = denoiser.denoise(together).pixels
    want = np.concatenate([denoiser.denoise(one).pixels for one in (plain, guided)])
    if denoiser.info.batch_invariant:
        np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(together[3:5].guidance, GUIDANCE[:2])
    # Equal where both fit one bucket.
    assert denoiser.predict_seconds(guided) >= denoiser.predict_seconds(plain)


def test_sampling_is_guided_at_every_step(denoiser: Denoiser) -> None:
    *_, plain = sample(denoiser, labels=1, seed=3)
    *_, guided = sample(denoiser, labels=1, seed=3, guidance=3.0)
    *_, one = sample(denoiser, labels=1, seed=3, guidance=1.0)
    assert torch.equal(plain.x, one.x)
    assert not torch.equal(plain.x, guided.x)


def test_an_image_without_a_label_cannot_be_guided(denoiser: Denoiser) -> None:
    query = make_query(random_images((2, *denoiser.info.shape)), from_sigma([1.0]), [1, -1])
    query.guidance = np.array([2.0, 2.0])
    with pytest.raises(InvalidArgumentError, match="guidance: expected 0 or 1 for an image with"):
        denoiser.check(query)
    query.guidance = np.array([2.0, 1.0])
    denoiser.check(query)


@pytest.mark.parametrize(
    "denoiser",
    [
        networks.denoiser(networks.config(null_label=False)),
        networks.denoiser(networks.config(label_count=0)),
        GaussianDenoiser(networks.SHAPE, torch.zeros(networks.SHAPE), torch.ones(networks.SHAPE)),
    ],
    ids=["no class for no label", "no labels", "gaussian"],
)
def test_a_model_without_a_class_for_no_label_cannot_be_guided(denoiser: Denoiser) -> None:
    labels = 0 if denoiser.info.label_count else -1
    query = make_query(random_images((1, *denoiser.info.shape)), from_sigma([1.0]), labels)
    query.guidance = np.array([2.0])
    with pytest.raises(InvalidArgumentError, match="guidance: expected 0 or 1 without condition"):
        denoiser.check(query)
    assert not denoiser.info.label_guidance
