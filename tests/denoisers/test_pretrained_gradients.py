"""Jacobian products of pretrained networks; an ONNX graph has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import onnx_models
from tests.support.denoisers import random_images
from tests.support.pretrained import SHAPE, scheduler, unet, write_folder

from els_service.denoisers.base import Denoiser, make_query
from els_service.denoisers.gradients import Differentiable
from els_service.denoisers.levels import from_sigma
from els_service.repository import ModelRepository

# Their schedulers convert tensors as numpy 1 did.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def served(root: Path, **fields: Any) -> Denoiser:
    parts = {"unet": unet(), "scheduler": scheduler(**fields)}
    write_folder(root / "model", "kind: diffusers\n", **parts)
    return ModelRepository(root).load("model")


@pytest.mark.slow
def test_a_unets_products_are_adjoint_and_match_differences(tmp_path: Path) -> None:
    denoiser = served(tmp_path)
    assert isinstance(denoiser, Differentiable)
    assert denoiser.info.has_gradients
    query = make_query(random_images((2, *SHAPE), 1), from_sigma([0.3, 1.0]))
    g, u = (random_images((2, *SHAPE), seed).numpy() for seed in (7, 8))
    pulled, pushed = denoiser.vjp(query, g).product, denoiser.jvp(query, u).product
    assert (pulled * u).sum((1, 2, 3)) == pytest.approx(
        (g * pushed).sum((1, 2, 3)), rel=1e-4, abs=1e-4
    )
    ahead, behind = (
        denoiser.denoise(make_query((query.pixels + d * u).astype(np.float32), query.level)).pixels
        for d in (1e-3, -1e-3)
    )
    difference = (ahead - behind) / 2e-3
    assert np.linalg.norm(pushed - difference) <= 1e-2 * np.linalg.norm(difference)


def test_a_product_is_zero_where_the_denoised_image_is_clipped(tmp_path: Path) -> None:
    denoiser = served(tmp_path, clip_sample=True, clip_sample_range=0.1)
    assert isinstance(denoiser, Differentiable)
    query = make_query(random_images((1, *SHAPE), 1), from_sigma([1.0]))
    u = random_images((1, *SHAPE), 8).numpy()
    answer = denoiser.jvp(query, u)
    clipped = np.abs(answer.mean) >= np.float32(0.1)
    assert 0 < clipped.sum() < clipped.size
    assert not answer.product[clipped].any()
    assert answer.product[~clipped].all()


def test_a_graph_has_no_products_and_says_so(tmp_path: Path) -> None:
    onnx_models.write(tmp_path, onnx_models.gaussian())
    denoiser = ModelRepository(tmp_path).load("model")
    assert not isinstance(denoiser, Differentiable)
    assert not denoiser.info.has_gradients
