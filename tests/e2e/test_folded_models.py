"""Models with a fold and with queries of another size, from a real server, against brute force."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from PIL import Image
from tests.support.bad_inferences import fp32, infer
from tests.support.models_folder import SHAPE, tiny_bank, write_models
from tests.support.processes import ServerProcess, serving
from tests.support.refusals import TIMEOUT_S
from tests.support.twin import Twin
from typer.testing import CliRunner, Result

from els_client import (
    AsyncClient,
    Bank,
    Client,
    ElsError,
    Evidence,
    InvalidArgumentError,
    Sizes,
)
from els_client.cli import app
from els_kernels import FOLD_GEOMETRIES
from els_kernels.reference_fold import FoldReference
from els_kernels.reference_fold_statistics import ReferenceFoldPosterior
from els_proto.denoise.v1 import denoise_pb2
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceStub
from els_proto.inference import grpc_service_pb2 as pb
from els_proto.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from els_service.denoisers.banks import save_bank
from els_service.denoisers.mixed_banks import AnyBank, make_mixed_bank

BANK = "bank: ../_banks/tiny.safetensors\nwindow: 3\n"
DOCUMENTS = {
    "plain": f"kind: analytic\nmachine: els\n{BANK}",
    "sized": f"kind: analytic\nmachine: els\n{BANK}sizes: {{height: [4, 20], width: [3, 40]}}\n",
    "folded": f"kind: analytic\nmachine: els\npadding: inside\nfold: 0.2\nsizes: any\n{BANK}",
    "inside": f"kind: analytic\nmachine: els\npadding: inside\n{BANK}",
    "local": f"kind: analytic\nmachine: local\npadding: circular\nfold: uniform\n{BANK}",
    "mixed": "kind: analytic\nmachine: els\nbank: ../_banks/mixed.safetensors\nwindow: 3\n"
    "fold: 0.5\nsizes: any\n",
}
MIXED = [(5, 8), (7, 4), (5, 8), (4, 4)]
SIGMA = [0.25, 4.0]
LARGE = (9, 14)
MAX_PIXELS = 2000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    models = write_models(tmp_path_factory.mktemp("folded") / "models", DOCUMENTS)
    save_bank(mixed_bank(), models / "_banks" / "mixed.safetensors")
    limits = {"ELS_MAX_PIXELS": str(MAX_PIXELS)}
    with serving("--models", models, "--threads", 1, **limits) as process:
        yield process


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.target, timeout_s=60) as client:
        yield client


@pytest.fixture(params=[Client, AsyncClient], ids=["sync", "async"])
async def twin(request: pytest.FixtureRequest, server: ServerProcess) -> AsyncIterator[Twin]:
    twin = Twin(request.param(server.target))
    yield twin
    await twin.close()


def mixed_bank() -> AnyBank:
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (1, *size), np.uint8) for size in MIXED]
    return make_mixed_bank(pictures, [1, 0, 0, 1], label_names=("sea", "hills"))


def images(size: tuple[int, ...] = SHAPE[1:], seed: int = 1) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=(2, 1, *size)).astype(np.float32)


def brute_force(client: Client, name: str, x: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    model = client.model(name)
    geometry = FOLD_GEOMETRIES[model.machine, model.padding]
    reference = FoldReference([tiny_bank().pixels()])
    return [
        reference(image, 1.0, sigma, 3, (0, 12), model.fold, geometry)[0].numpy()
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
        want, _ = reference(torch.from_numpy(x[b]), 1.0, SIGMA[b], 3, limits, 0.5, geometry)
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


SOURCES = [
    ("folded", SHAPE[1:]),
    ("folded", LARGE),
    ("sized", LARGE),
    ("sized", (4, 3)),
    ("inside", SHAPE[1:]),
    ("local", SHAPE[1:]),
]
"""Models with queries of sizes that they answer."""


def references(client: Client, name: str, x: np.ndarray[Any, Any]) -> list[ReferenceFoldPosterior]:
    """Return the specification of each image."""
    model, bank = client.model(name), list(tiny_bank().pixels())
    geometry = FOLD_GEOMETRIES[model.machine, model.padding]
    return [
        ReferenceFoldPosterior(image, bank, 1.0, sigma, 3, model.fold, geometry)
        for image, sigma in zip(torch.from_numpy(x), SIGMA, strict=True)
    ]


def close(got: np.ndarray[Any, Any], want: torch.Tensor, slack: float = 1e-5) -> bool:
    return bool(np.abs(got - want.numpy()).max() <= slack * max(1.0, float(want.abs().max())))


@pytest.mark.parametrize(("model", "size"), SOURCES)
def test_an_explanation_is_that_of_brute_force(
    client: Client, model: str, size: tuple[int, int]
) -> None:
    x = images(size)
    found = client.explain(x, model=model, sigma=SIGMA, top=16, images=2)
    assert found.sources.shape == (2, *size, 16, 3)
    assert found.shares.sum(1) == pytest.approx(np.ones(2), abs=1e-6)
    assert [pixels.shape for pixels in found.images[1].values()] == [SHAPE] * 2
    for b, reference in enumerate(references(client, model, x)):
        assert close(found.denoised[b], reference.mean())
        assert close(found.variance[b], reference.variance())
        assert close(found.entropy[b], reference.entropy(), 1e-4)
        assert close(found.shares[b], reference.shares())
        every = torch.stack(reference.weights(), 1)
        largest = every.flatten(1).sort(descending=True).values[:, :16]
        given = found.weights[b].reshape(len(largest), 16)[:, : largest.shape[1]]
        assert close(given, largest)
        for place, sources in enumerate(found.sources[b].reshape(len(largest), 16, 3)):
            image, row, col = sources[0].tolist()
            weight = float(every[place, image, row * SHAPE[2] + col])
            assert given[place, 0] == pytest.approx(weight, abs=1e-5)


@pytest.mark.parametrize(("model", "size"), SOURCES)
def test_products_and_variance_are_those_of_brute_force(
    client: Client, model: str, size: tuple[int, int]
) -> None:
    x, g = images(size), images(size, 2)
    options: dict[str, Any] = {"model": model, "sigma": SIGMA}
    evidence = Evidence()
    denoised, pulled = client.vjp(x, g, evidence=evidence, **options)
    same, pushed = client.jvp(x, g, **options)
    assert np.array_equal(denoised, same)
    assert not evidence.data
    plain, variance = client.denoise_with_variance(x, **options)
    assert np.array_equal(plain, client.denoise(x, **options))
    for b, reference in enumerate(references(client, model, x)):
        assert close(denoised[b], reference.mean())
        assert close(pulled[b], reference.vjp(torch.from_numpy(g[b])), 1e-4)
        assert close(pushed[b], reference.jvp(torch.from_numpy(g[b])), 1e-4)
        assert close(variance[b], reference.variance())


def test_sources_in_a_bank_of_several_sizes_have_the_coordinates_of_their_image(
    client: Client,
) -> None:
    x, bank = images(LARGE), mixed_bank()
    pixels = [torch.from_numpy(bank.image(index)) for index in range(len(bank))]
    found = client.explain(x, model="mixed", sigma=SIGMA, top=4, images=3)
    geometry = FOLD_GEOMETRIES["els", "zeros"]
    for b, sigma in enumerate(SIGMA):
        one = torch.from_numpy(x[b])
        want = ReferenceFoldPosterior(one, pixels, 1.0, sigma, 3, 0.5, geometry)
        assert close(found.denoised[b], want.mean())
        assert close(found.variance[b], want.variance())
        assert close(found.shares[b], want.shares())
        weights = want.weights()
        sources = found.sources[b].reshape(-1, 4, 3)
        for place, listed in enumerate(found.weights[b].reshape(-1, 4)):
            for weight, (image, row, col) in zip(listed, sources[place].tolist(), strict=True):
                exact = weights[image][place, row * pixels[image].shape[2] + col]
                assert weight == pytest.approx(float(exact), abs=1e-5)
        assert len(found.images[b]) == 3
        for index, values in found.images[b].items():
            assert np.array_equal(values, bank.image(index))


def test_els_explain_draws_bank_images_of_their_own_sizes(
    server: ServerProcess, tmp_path: Path
) -> None:
    words = ["explain", "--seed", "0", "--steps", "2", "--model", "mixed", "--json"]
    out = tmp_path / "why"
    result = CliRunner().invoke(app, [*words, "--out", str(out), "--target", server.target])
    assert result.exit_code == 0, result.output
    assert {one["image"] for one in json.loads(result.output)["bank_images"]} <= {0, 1, 2, 3}
    with Image.open(out / "sheet.png") as sheet:
        assert min(sheet.size) > 100


def test_queries_of_the_banks_size_have_the_sources_of_the_model_without_sizes(
    client: Client,
) -> None:
    x, g = images(), images(seed=2)
    plain, sized = (client.explain(x, model=name, sigma=SIGMA) for name in ("plain", "sized"))
    assert np.array_equal(plain.sources, sized.sources)
    assert np.array_equal(plain.weights, sized.weights)
    first, second = (client.vjp(x, g, model=name, sigma=SIGMA)[1] for name in ("plain", "sized"))
    assert np.array_equal(first, second)


def test_products_of_many_sizes_at_once_have_the_bits_that_they_have_alone(client: Client) -> None:
    asked = [images(size, seed) for seed, size in enumerate([LARGE, (4, 3), SHAPE[1:], LARGE] * 2)]

    def product(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return client.vjp(x, x, model="folded", sigma=SIGMA)[1]

    alone = list(map(product, asked))
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(product, asked))
    for one, same in zip(alone, together, strict=True):
        assert np.array_equal(one, same)


async def test_a_step_of_a_sample_of_another_size_is_explained_and_reported(twin: Twin) -> None:
    options: dict[str, Any] = {"model": "folded", "steps": 3, "size": LARGE}
    steps = await twin.steps(explain_steps=[3], explain_top=2, originality=True, **options)
    found = steps[-1].explanation
    assert found.sources.shape == (1, *LARGE, 2, 3)
    assert np.abs(found.denoised - steps[-1].denoised).max() <= 1e-5
    (report,) = steps[-1].originality
    assert report.gap_ratio is None
    assert report.absent["gap_ratio"] == "needs a bank of images of its size, 1×9×14"
    assert report.largest_region is not None
    assert 0 < report.largest_region <= 1


async def test_an_image_of_the_bank_is_one_region_at_its_place(twin: Twin) -> None:
    x = tiny_bank().pixels()[4:5].numpy()
    for model in ("folded", "inside", "local"):
        (found,) = await twin.call("originality", x, model=model, nearest=1)
        assert found.nearest.tolist() == [4]
        assert (found.largest_image, found.memorised) == (4, True)
        assert found.in_place == pytest.approx(1)


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
