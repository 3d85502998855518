"""Models with a fold and with queries of another size, from a real server, against brute force."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from PIL import Image
from tests.support.bad_inferences import fp32, infer
from tests.support.folded_models import LARGE, SIGMA, images, mixed_bank
from tests.support.models_folder import SHAPE, tiny_bank
from tests.support.processes import ServerProcess
from tests.support.refusals import TIMEOUT_S
from tests.support.twin import Twin
from typer.testing import CliRunner, Result

from els_client import (
    Bank,
    Client,
    ElsError,
    InvalidArgumentError,
    Sizes,
)
from els_client.cli import app
from els_kernels import FOLD_GEOMETRIES
from els_kernels.fold_plan import FoldQuery
from els_kernels.reference_fold import FoldReference
from els_proto.denoise.v1 import denoise_pb2
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceStub
from els_proto.inference import grpc_service_pb2 as pb
from els_proto.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub


@pytest.fixture(scope="module")
def server(folded_server: ServerProcess) -> ServerProcess:
    return folded_server


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.target, timeout_s=60) as client:
        yield client


def brute_force(client: Client, name: str, x: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    model = client.model(name)
    geometry = FOLD_GEOMETRIES[model.machine, model.padding]
    reference = FoldReference([tiny_bank().pixels()])
    return [
        reference(FoldQuery(image, 1.0, sigma, 3, (0, 12), model.fold, geometry))[0].numpy()
        for image, sigma in zip(torch.from_numpy(x), SIGMA, strict=True)
    ]


def test_a_model_publishes_its_fold_and_its_sizes(client: Client) -> None:
    plain, sized, folded, local = map(client.model, ("plain", "sized", "folded", "local"))
    assert (plain.fold, plain.sizes) == (0.0, None)
    assert (sized.fold, sized.sizes) == (0.0, Sizes((4, 20), (3, 40)))
    assert (folded.fold, folded.sizes) == (0.2, Sizes((1, 4096), (1, 4096)))
    assert (local.fold, local.sizes) == (math.inf, None)
    assert folded.padding == "inside"
    assert folded.shape == SHAPE
    assert folded.batch_invariant
    assert folded.has_sources
    assert sized.has_gradients
    # The fold computes with the stored bytes, the plain machine with a copy in float32.
    assert 5 * folded.memory_bytes == plain.memory_bytes


def test_a_model_of_images_of_several_sizes_publishes_them_and_answers_any(
    client: Client,
) -> None:
    model = client.model("mixed")
    assert model.bank is not None
    assert (model.bank.images, model.bank.sizes) == (4, Sizes((4, 7), (4, 8)))
    assert client.model("folded").bank == dataclasses.replace(model_bank(client), sizes=None)
    assert (model.shape, model.sizes) == ((1, 5, 8), Sizes((1, 4096), (1, 4096)))
    assert model.window is not None
    assert model.window.max_k == 3
    bank, x = mixed_bank(), images(LARGE)
    reference = FoldReference([torch.from_numpy(group) for group in bank.groups])
    got = client.denoise(x, model="mixed", sigma=SIGMA, label=[-1, 1])
    geometry = FOLD_GEOMETRIES["els", "zeros"]
    for b, limits in enumerate([(0, 4), (2, 4)]):
        image = torch.from_numpy(x[b])
        want, _ = reference(FoldQuery(image, 1.0, SIGMA[b], 3, limits, 0.5, geometry))
        assert np.abs(got[b] - want.numpy()).max() <= 1e-5
    *_, own = client.sample(model="mixed", steps=2, label=1)
    assert own.x.shape == (1, 1, 5, 8)


def model_bank(client: Client) -> Bank:
    bank = client.model("folded").bank
    assert bank is not None
    return bank


def els(server: ServerProcess, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["sample", "--target", server.target, *arguments])


def test_the_command_samples_the_size_that_is_asked_for(
    server: ServerProcess, client: Client, tmp_path: Path
) -> None:
    out = tmp_path / "out.png"
    common = ("--steps", "2", "--out", str(out))
    result = els(server, "--model", "mixed", "--size", "9x14", *common)
    assert result.exit_code == 0, result.output
    with Image.open(out) as picture:
        shown = np.asarray(picture)
    *_, last = client.sample(model="mixed", steps=2, size=LARGE)
    factor = shown.shape[0] // 9
    assert shown.shape[:2] == (9 * factor, 14 * factor)
    want = np.rint((last.x[0, 0] + 1) * 127.5).clip(0, 255)
    assert np.abs(shown[::factor, ::factor].astype(float) - want).max() <= 1
    Image.new("L", (14, 9)).save(start := tmp_path / "start.png")
    begun = ("--start", str(start), "--start-time", "0.5")
    assert els(server, "--model", "mixed", "--size", "9X14", *begun, *common).exit_code == 0
    denoised = ("denoise", str(start), str(out), "--sigma", "1", "--target", server.target)
    assert CliRunner().invoke(app, [*denoised, "--model", "mixed"]).exit_code == 0
    with Image.open(out) as picture:
        assert picture.size == (14, 9)
    refused = CliRunner().invoke(app, [*denoised, "--model", "plain"])
    assert "the model takes 5 × 6: pass --resize" in " ".join(refused.stderr.split())
    # The own size of a model without sizes is legal.
    assert els(server, "--model", "plain", "--size", "6x5", *common).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--model", "plain", "--size", "9x14"),
            "size: expected none, as plain has 6x5 alone, got 9x14",
        ),
        (("--model", "sized", "--size", "3x9"), "height: expected 0, or 4 to 20, got 3"),
        (("--model", "sized", "--size", "0x9"), "size: expected positive height and width"),
        (("--model", "sized", "--size", "9"), "size: expected HEIGHTxWIDTH in pixels, got 9"),
        (("--model", "sized", "--size", "9x9x9"), "size: expected HEIGHTxWIDTH in pixels"),
        (("--model", "sized", "--size", "-9x9"), "size: expected HEIGHTxWIDTH in pixels"),
        (("--model", "sized", "--size", "²x9"), "size: expected HEIGHTxWIDTH in pixels"),
        (("--model", "sized", "--size", f"{'9' * 30}x9"), "size: expected HEIGHTxWIDTH in pixels"),
    ],
)
def test_a_size_that_the_command_cannot_sample_is_refused(
    server: ServerProcess, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = els(server, *arguments, "--steps", "2", "--out", str(tmp_path / "out.png"))
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "size"),
    [("folded", SHAPE[1:]), ("folded", LARGE), ("sized", LARGE), ("local", SHAPE[1:])],
)
async def test_an_answer_is_that_of_brute_force(
    twin: Twin, client: Client, model: str, size: tuple[int, int]
) -> None:
    x = images(size)
    got = await twin.call("denoise", x, model=model, sigma=SIGMA)
    assert got.shape == x.shape
    for mean, want in zip(got, brute_force(client, model, x), strict=True):
        assert np.abs(mean - want).max() <= 1e-5
    score = await twin.call("score", x, model=model, sigma=SIGMA)
    assert np.abs(score[0] - (got[0] - x[0]) / SIGMA[0] ** 2).max() <= 1e-4
    _, evidence = await twin.call("denoise_with_evidence", x, model=model, sigma=SIGMA)
    assert evidence.shape == (2, *size)


def test_queries_of_the_banks_size_have_the_bits_of_the_model_without_sizes(
    client: Client,
) -> None:
    x = images()
    plain, sized = (client.denoise(x, model=name, sigma=SIGMA) for name in ("plain", "sized"))
    assert np.array_equal(plain, sized)


def test_queries_of_many_sizes_at_once_have_the_bits_that_they_have_alone(client: Client) -> None:
    asked = [images(size, seed) for seed, size in enumerate([LARGE, (4, 3), SHAPE[1:], LARGE] * 4)]

    def denoised(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return client.denoise(x, model="folded", sigma=SIGMA)

    alone = list(map(denoised, asked))
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(denoised, asked))
    for one, same in zip(alone, together, strict=True):
        assert np.array_equal(one, same)


@pytest.mark.parametrize(
    ("model", "size", "expected"),
    [
        ("plain", LARGE, r"x: expected shape \[B, 1, 6, 5\], got \[2, 1, 9, 14\]"),
        ("local", LARGE, r"x: expected shape \[B, 1, 6, 5\]"),
        ("sized", (3, 9), r"x: expected shape \[B, 1, 4 to 20, 3 to 40\], got \[2, 1, 3, 9\]"),
        ("sized", (9, 41), r"x: expected shape \[B, 1, 4 to 20, 3 to 40\]"),
        ("folded", (2, 9), r"x: expected sides of at least 3, the model's largest window"),
    ],
)
def test_a_size_that_a_model_does_not_answer_is_rejected(
    client: Client, model: str, size: tuple[int, int], expected: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=expected):
        client.denoise(images(size), model=model, sigma=SIGMA)


def test_the_limit_on_pixels_holds_for_every_size(client: Client) -> None:
    client.denoise(images((25, 40)), model="folded", sigma=SIGMA)
    with pytest.raises(ElsError) as caught:
        client.denoise(images((26, 40)), model="folded", sigma=SIGMA)
    assert caught.value.code == "RESOURCE_EXHAUSTED"
    with pytest.raises(ElsError) as caught:
        list(client.sample(model="folded", count=2, steps=2, size=(26, 40)))
    assert caught.value.code == "RESOURCE_EXHAUSTED"


async def test_a_sample_has_the_size_that_is_asked_for(twin: Twin, client: Client) -> None:
    *_, last = await twin.steps(model="folded", count=2, seed=3, steps=3, size=LARGE)
    assert last.x.shape == (2, 1, *LARGE)
    *_, own = await twin.steps(model="folded", seed=3, steps=3)
    assert own.x.shape == (1, *SHAPE)
    *_, start = await twin.steps(
        model="folded", steps=3, size=LARGE, start=images(LARGE)[:1], start_time=0.5
    )
    assert start.x.shape == (1, 1, *LARGE)
    # At the last level D(x) hardly differs from x: the sample is made of patches of the bank.
    assert np.isfinite(last.x).all()
    assert np.abs(last.x).max() <= 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"model": "plain", "size": LARGE}, "height: expected 0, or 6 to 6, got 9"),
        ({"model": "plain", "size": (6, 9)}, "width: expected 0, or 5 to 5, got 9"),
        ({"model": "sized", "size": (3, 9)}, "height: expected 0, or 4 to 20, got 3"),
        (
            {"model": "sized", "size": LARGE, "start": images(), "start_time": 0.5},
            r"start.shape: expected \[1 or 2, 1, 9, 14\], got \[2, 1, 6, 5\]",
        ),
        ({"model": "sized", "size": (0, 3)}, "size: expected positive height and width"),
        ({"model": "sized", "size": (2**70, 3)}, "size: expected positive height and width"),
        ({"model": "sized", "size": (3,)}, "size: expected positive height and width"),
        ({"model": "sized", "size": (3.5, 4)}, "size: expected an integer, got 3.5"),
    ],
)
def test_a_sample_of_another_size_is_rejected(
    client: Client, options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=expected):
        list(client.sample(count=2, steps=2, **options))


def test_a_resume_token_is_bound_to_the_size(server: ServerProcess) -> None:
    def request(**changes: Any) -> denoise_pb2.SampleRequest:
        common = {"model": "sized", "steps": 3, "height": 9, "width": 14}
        return denoise_pb2.SampleRequest(**{**common, **changes})

    with grpc.insecure_channel(server.target) as channel:
        stub = DenoiserServiceStub(channel)
        steps = list(stub.Sample(request(return_resume_token=True), timeout=TIMEOUT_S))
        token = steps[0].resume_token
        rest = list(stub.Sample(request(resume_token=token), timeout=TIMEOUT_S))
        assert rest[-1].x.data == steps[-1].x.data
        turned = request(resume_token=token, height=14, width=9)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Sample(turned, timeout=TIMEOUT_S))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_the_inference_protocol_answers_other_sizes(server: ServerProcess, client: Client) -> None:
    x = images(LARGE)
    with grpc.insecure_channel(server.target) as channel:
        stub = GRPCInferenceServiceStub(channel)
        metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name="sized"), timeout=TIMEOUT_S)
        shapes = {tensor.name: list(tensor.shape) for tensor in metadata.outputs}
        assert shapes == {
            "denoised": [-1, 1, -1, -1],
            "score": [-1, 1, -1, -1],
            "log_evidence": [-1, -1, -1],
        }
        pixels = fp32("x", *x.ravel().tolist(), shape=x.shape)
        request = infer(pixels, fp32("sigma", *SIGMA), model="sized")
        answer = stub.ModelInfer(request, timeout=TIMEOUT_S)
    outputs = dict(zip((out.name for out in answer.outputs), answer.outputs, strict=True))
    assert list(outputs["denoised"].shape) == list(x.shape)
    assert list(outputs["log_evidence"].shape) == [2, *LARGE]
    index = [out.name for out in answer.outputs].index("denoised")
    got = np.frombuffer(answer.raw_output_contents[index], "<f4").reshape(x.shape)
    assert np.array_equal(got, client.denoise(x, model="sized", sigma=SIGMA))
