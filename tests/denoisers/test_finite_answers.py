"""No model of any kind answers with NaN or infinity, nor hides them by clipping."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import helper
from tests.support import networks, onnx_models, pretrained
from tests.support.denoisers import KINDS, build, random_images

from els_service.denoisers.answers import score_array
from els_service.denoisers.banks import Bank
from els_service.denoisers.base import Condition, Denoiser, Query, make_query
from els_service.denoisers.levels import MAX_SIGMA, MIN_SIGMA, NoiseLevel, from_sigma
from els_service.denoisers.networks import NetworkDenoiser, NetworkDocument, build_network
from els_service.denoisers.networks.config import Execution
from els_service.denoisers.pretrained.latent import LatentDenoiser
from els_service.errors import ElsError
from els_service.repository import ModelRepository

MAX_PIXEL = 1e9
"""Largest legal pixel, as the server checks."""


def _network(_: Path, precision: str) -> Denoiser:
    config = networks.config(label_count=0)
    network = build_network(config)
    for parameter in network.parameters():
        parameter.data.fill_(1e4)
    return NetworkDenoiser(network, NetworkDocument(config, Execution(precision=precision)))


def _overflowing(module: Any, *layers: str) -> Any:
    """Return the module with layers whose product overflows float32."""
    for name in layers:
        module.get_submodule(name).weight.data.fill_(1e38)
    return module


def _diffusers(root: Path, scheduler: Any) -> Denoiser:
    network = _overflowing(pretrained.unet(), "conv_out")
    pretrained.write_folder(root / "model", "kind: diffusers\n", unet=network, scheduler=scheduler)
    return ModelRepository(root).load("model")


def _latent(root: Path, unet: Any, vae: Any) -> LatentDenoiser:
    parts = {"unet": unet, "vae": vae, "scheduler": pretrained.scheduler()}
    pretrained.write_folder(root / "model", "kind: latent\n", **parts)
    denoiser = ModelRepository(root).load("model")
    assert isinstance(denoiser, LatentDenoiser)
    return denoiser


def _onnx(root: Path) -> Denoiser:
    nodes = [onnx_models.COLUMN, helper.make_node("Pow", ["x", "power"], ["y"])]
    initializers = [onnx_models.AXES, onnx_models.constant("power", 64)]
    onnx_models.write(root, onnx_models.graph(nodes, initializers=initializers))
    return ModelRepository(root).load("model")


OVERFLOWING: dict[str, Callable[[Path], Denoiser]] = {
    "network in float32": lambda root: _network(root, "float32"),
    "network in bfloat16": lambda root: _network(root, "bfloat16"),
    "network in float16": lambda root: _network(root, "float16"),
    "diffusers": lambda root: _diffusers(root, pretrained.scheduler()),
    "diffusers with clipping": lambda root: _diffusers(
        root, pretrained.scheduler(clip_sample=True)
    ),
    "latent": lambda root: _latent(
        root, _overflowing(pretrained.conditional_unet(), "conv_out"), pretrained.autoencoder()
    ),
    "onnx": _onnx,
}


def _query(denoiser: Denoiser, x: float = 1e3) -> Query:
    shape, width = denoiser.info.shape, denoiser.info.condition_width
    condition = [Condition(np.ones((2, width), np.float32))] if width else []
    return make_query(torch.full((2, *shape), x), from_sigma([1.0]), (), (), condition)


@pytest.mark.parametrize("name", OVERFLOWING)
def test_a_network_that_overflows_ends_with_an_error(tmp_path: Path, name: str) -> None:
    denoiser = OVERFLOWING[name](tmp_path)
    with pytest.raises(ElsError, match="returned NaN or infinity"):
        denoiser.denoise(_query(denoiser))


def test_a_decoder_that_overflows_ends_with_an_error(tmp_path: Path) -> None:
    vae = _overflowing(pretrained.autoencoder(), "decoder.conv_out")
    denoiser = _latent(tmp_path, pretrained.conditional_unet(), vae)
    latents = random_images((2, *pretrained.LATENT)).numpy()
    with pytest.raises(ElsError, match="the decoder returned NaN or infinity"):
        denoiser.decode(latents)


@pytest.mark.parametrize("sigma", [MIN_SIGMA, 1.0, MAX_SIGMA])
@pytest.mark.parametrize("preserving", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_closed_forms_and_machines_are_finite_at_every_legal_pixel_and_level(
    labelled: Bank, name: str, preserving: bool, sigma: float
) -> None:
    denoiser = build(name, labelled)
    a = 1 / math.hypot(1, sigma) if preserving else 1.0
    x = torch.full((1, *labelled.shape), MAX_PIXEL)
    x[..., ::2] = -MAX_PIXEL
    query = make_query(x, NoiseLevel(np.array([a]), np.array([a * sigma])))
    pixels = denoiser.denoise(query).pixels
    assert np.isfinite(pixels).all()
    assert np.isfinite(score_array(query, pixels)).all()


def test_a_score_beyond_float32_is_an_error() -> None:
    query = make_query(torch.ones(1, 1, 2, 2), from_sigma([MIN_SIGMA]))
    with pytest.raises(ElsError, match="the score of this answer is too large for float32"):
        score_array(query, np.full((1, 1, 2, 2), 1e37, np.float32))
