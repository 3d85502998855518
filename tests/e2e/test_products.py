"""Jacobian products and their evidence from a real server, against brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from tests.support import onnx_models
from tests.support.explained import CHOSEN, SIGMA, assert_serves, images, message_of, references
from tests.support.models_folder import (
    WITH_EVIDENCE,
    write_models,
)
from tests.support.processes import serving
from tests.support.twin import Twin

from els_client import Client, ElsError, Evidence
from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceStub
from els_service.denoisers.base import make_query
from els_service.denoisers.gradients import Differentiable
from els_service.denoisers.levels import from_sigma
from els_service.repository import ModelRepository


@pytest.mark.parametrize("model", WITH_EVIDENCE)
async def test_products_from_evidence_have_the_same_bits(twin: Twin, model: str) -> None:
    x, options = images(1), {"model": model, "sigma": SIGMA, "label": CHOSEN}
    evidence = Evidence()
    for method, seed in (("vjp", 2), ("jvp", 3), ("vjp", 4)):
        want = await twin.call(method, x, images(seed), **options)
        got = await twin.call(method, x, images(seed), evidence=evidence, **options)
        assert np.array_equal(got[0], want[0])
        assert np.array_equal(got[1], want[1])
        assert evidence.data


@pytest.mark.parametrize("damage", ["another x", "another level", "a bit", "cut", "foreign"])
def test_evidence_of_something_else_is_not_used(client: Client, damage: str) -> None:
    x, g, sigma = images(1), images(2), 1.0
    evidence = Evidence()
    client.vjp(images(5), g, evidence=evidence, model="zeros", sigma=1.0)
    if damage == "another level":
        x, sigma = images(5), 2.0
    elif damage == "a bit":
        x, evidence.data = images(5), bytes([evidence.data[0] ^ 1]) + evidence.data[1:]
    elif damage == "cut":
        x, evidence.data = images(5), evidence.data[:-1]
    elif damage == "foreign":
        x, evidence.data = images(5), b"\xff" * len(evidence.data)
    sent = evidence.data
    for method in (client.vjp, client.jvp):
        evidence.data = sent
        want = method(x, g, model="zeros", sigma=sigma)
        got = method(x, g, evidence=evidence, model="zeros", sigma=sigma)
        assert np.array_equal(got[1], want[1])
        # That of this query instead.
        assert evidence.data not in (b"", sent)
    used = evidence.data
    client.vjp(x, g, evidence=evidence, model="zeros", sigma=sigma)
    assert evidence.data is used


def test_a_model_without_a_first_pass_has_no_evidence(client: Client) -> None:
    evidence = Evidence(b"of another model")
    want = client.vjp(images(1), images(2), model="wiener", sigma=1.0)
    got = client.vjp(images(1), images(2), evidence=evidence, model="wiener", sigma=1.0)
    assert np.array_equal(got[1], want[1])
    assert evidence.data == b"of another model"


@pytest.mark.parametrize("model", [*WITH_EVIDENCE, "wiener"])
async def test_products_are_the_library_s(twin: Twin, models: Path, model: str) -> None:
    x, g = images(1), images(2)
    denoiser = ModelRepository(models).load(model)
    assert isinstance(denoiser, Differentiable)
    query = make_query(x, from_sigma(SIGMA), CHOSEN)
    options: dict[str, Any] = {"model": model, "sigma": SIGMA, "label": CHOSEN}
    for name in ("vjp", "jvp"):
        denoised, product = await twin.call(name, x, g, **options)
        want = getattr(denoiser, name)(query, g)
        assert np.array_equal(denoised, want.mean)
        assert np.array_equal(product, want.product)


@pytest.mark.parametrize("model", WITH_EVIDENCE)
def test_products_are_automatic_differentiation_of_brute_force(
    client: Client, models: Path, model: str
) -> None:
    x, g = images(1), images(2)
    _, pulled = client.vjp(x, g, model=model, sigma=SIGMA, label=CHOSEN)
    _, pushed = client.jvp(x, g, model=model, sigma=SIGMA, label=CHOSEN)
    for b, (reference, _) in enumerate(references(models, model, x)):
        along = torch.from_numpy(g[b])
        for got, want in ((pulled, reference.vjp(along)), (pushed, reference.jvp(along))):
            assert np.abs(got[b] - want.numpy()).max() <= 1e-4 * float(want.abs().max()) + 1e-9


def test_an_onnx_model_has_no_gradients_and_is_named(tmp_path: Path) -> None:
    root = write_models(tmp_path / "models", {})
    onnx_models.write(root, onnx_models.gaussian())
    x = np.zeros((1, *onnx_models.SHAPE), np.float32)
    with serving("--models", root, "--threads", 1) as server, Client(server.target) as client:
        assert not client.model("model").has_gradients
        for call in (client.vjp, client.jvp):
            with pytest.raises(ElsError, match="model has no gradients: a model of kind onnx") as e:
                call(x, x, model="model", sigma=1.0)
            assert e.value.code == "FAILED_PRECONDITION"


@pytest.mark.parametrize(
    ("field", "tensor"),
    [
        ("cotangent.shape", pb.Tensor()),
        ("cotangent.shape", pb.Tensor(dtype=pb.DTYPE_F32, shape=[1, 1, 6, 5], data=bytes(120))),
        ("cotangent.data", pb.Tensor(dtype=pb.DTYPE_F32, shape=[3, 1, 6, 5], data=b"1234")),
        ("cotangent.dtype", pb.Tensor(dtype=pb.DTYPE_U8, shape=[3, 1, 6, 5], data=bytes(90))),
        ("cotangent", pb.Tensor(dtype=pb.DTYPE_F32, shape=[3, 1, 6, 5], data=b"\xff" * 360)),
    ],
)
def test_a_bad_cotangent_is_named(
    channel: grpc.Channel, client: Client, field: str, tensor: pb.Tensor
) -> None:
    request = pb.VjpRequest(
        model="zeros", x=message_of(images(1)), level=pb.NoiseLevel(sigma=[1.0]), cotangent=tensor
    )
    with pytest.raises(grpc.RpcError) as caught:
        DenoiserServiceStub(channel).Vjp(request, timeout=30)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert str(caught.value.details()).startswith(f"{field}: expected")
    assert_serves(client)
