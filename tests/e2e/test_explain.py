"""Sources and variances from a real server, against brute force on its small bank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tests.support.explained import (
    CHOSEN,
    RANGES,
    SIGMA,
    assert_serves,
    images,
    message_of,
    references,
    within,
)
from tests.support.models_folder import (
    DOCUMENTS,
    SHAPE,
    WITH_EVIDENCE,
    tiny_bank,
    write_models,
)
from tests.support.processes import serving
from tests.support.twin import Twin

from els_client import Client, ElsError, InvalidArgumentError
from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceStub
from els_service.denoisers.banks import make_bank, save_bank


@pytest.mark.parametrize("model", WITH_EVIDENCE)
async def test_an_explanation_is_that_of_brute_force(twin: Twin, models: Path, model: str) -> None:
    x = images(1)
    found = await twin.call("explain", x, model=model, sigma=SIGMA, label=CHOSEN, top=5)
    assert found.sources.shape == (3, *SHAPE[1:], 5, 3)
    assert found.weights.shape == (3, *SHAPE[1:], 5)
    assert found.shares.sum(1) + found.dropped_share == pytest.approx(np.ones(3), abs=1e-6)
    assert found.bank_fingerprint == tiny_bank().fingerprint
    assert found.label_names == ("dot", "dash", "gap")
    for b, (reference, slack) in enumerate(references(models, model, x)):
        lo, hi = RANGES[b]
        weights = reference.log_weights().exp()
        within(found.denoised[b], reference.mean(), slack.mean)
        within(found.variance[b], reference.variance(), slack.variance)
        within(found.entropy[b], reference.entropy(), slack.entropy)
        assert found.effective_sources[b] == pytest.approx(np.exp(found.entropy[b]), rel=1e-6)
        within(found.shares[b, lo:hi], reference.shares(), slack.shares)
        listed = found.sources[b].reshape(-1, 5, 3)
        for u, own in enumerate(found.weights[b].reshape(-1, 5)):
            best, places = weights[u].flatten().topk(min(5, weights[u].numel()))
            # Weights that are equal but for errors may be ranked in any order.
            within(own[: len(best)], best, 2 * slack.weights[u].flatten()[places].amax())
            for (image, row, col), weight in zip(listed[u].tolist(), own, strict=True):
                if image >= 0:
                    place = u, image - lo, row * SHAPE[2] + col
                    within(weight, weights[place], slack.weights[place])
                    assert found.labels[image] == tiny_bank().labels[image]


@pytest.mark.parametrize("model", WITH_EVIDENCE)
async def test_an_explanation_has_the_bank_images_of_largest_share(twin: Twin, model: str) -> None:
    options: dict[str, Any] = {"model": model, "sigma": SIGMA, "label": CHOSEN}
    found = await twin.call("explain", images(1), images=3, **options)
    pixels = tiny_bank().pixels().numpy()
    for shares, returned in zip(found.shares, found.images, strict=True):
        assert list(returned) == np.argsort(-shares, kind="stable")[: len(returned)].tolist()
        assert len(returned) == min(3, np.count_nonzero(shares))
        for image, values in returned.items():
            assert np.array_equal(values, pixels[image])
    assert found.file_names == {}
    without = await twin.call("explain", images(1), **options)
    assert without.images == ({}, {}, {})


def test_an_explanation_names_the_files_that_the_bank_knows(tmp_path: Path) -> None:
    root = write_models(tmp_path / "models", {"zeros": DOCUMENTS["zeros"]})
    bank = tiny_bank(named=True)
    save_bank(bank, root / "_banks" / "tiny.safetensors")
    assert bank.file_names is not None
    with serving("--models", root, "--threads", 1) as server, Client(server.target) as client:
        found = client.explain(images(1), model="zeros", sigma=10.0)
    assert found.file_names == dict(enumerate(bank.file_names))
    assert found.file_names[0] == "0.png"
    assert found.file_names[1] == "3.png"


@pytest.mark.parametrize("model", WITH_EVIDENCE)
@pytest.mark.parametrize("evidence", [False, True])
def test_a_variance_comes_with_the_bits_of_a_plain_answer(
    channel: grpc.Channel, models: Path, model: str, evidence: bool
) -> None:
    x = images(1)
    request = pb.DenoiseRequest(
        model=model, x=message_of(x), labels=CHOSEN, return_log_evidence=evidence
    )
    request.level.sigma.extend(SIGMA)
    stub = DenoiserServiceStub(channel)
    plain = stub.Denoise(request, timeout=30)
    request.return_variance = True
    answer = stub.Denoise(request, timeout=30)
    assert answer.denoised == plain.denoised
    assert answer.log_evidence == plain.log_evidence
    assert list(answer.variance.shape) == [3, *SHAPE]
    variance = np.frombuffer(answer.variance.data, "<f4").reshape(3, *SHAPE)
    for got, (reference, slack) in zip(variance, references(models, model, x), strict=True):
        within(got, reference.variance(), slack.variance)
    (streamed,) = stub.DenoiseStream(iter([request]), timeout=30)
    assert streamed.response == answer


async def test_a_client_returns_a_variance_beside_the_images(twin: Twin) -> None:
    options: dict[str, Any] = {"model": "zeros", "sigma": SIGMA, "label": CHOSEN}
    denoised, variance = await twin.call("denoise_with_variance", images(1), **options)
    found = await twin.call("explain", images(1), **options)
    assert np.array_equal(denoised, await twin.call("denoise", images(1), **options))
    assert np.array_equal(variance, found.variance)


@pytest.mark.parametrize("model", ["gaussian", "wiener"])
def test_a_model_without_a_variance_is_named(client: Client, model: str) -> None:
    x = np.zeros((1, *client.model(model).shape), np.float32)
    text = rf"return_variance: expected unset, or a model with sources \(.*, zeros\), got .*{model}"
    with pytest.raises(InvalidArgumentError, match=text):
        client.denoise_with_variance(x, model=model, sigma=1.0)
    assert_serves(client)


@pytest.mark.parametrize("sampler", ["ddim", "ddim_released", "heun", "dpmpp_2m"])
async def test_steps_of_a_sample_are_explained_as_their_queries_are(
    twin: Twin, sampler: str
) -> None:
    options: dict[str, Any] = {"model": "zeros", "count": 2, "steps": 5, "label": [0, 2]}
    plain = await twin.steps(sampler=sampler, **options)
    total = len(plain)
    explained = {"explain_steps": [1, total], "explain_top": 3, "explain_images": 2}
    steps = await twin.steps(sampler=sampler, **options, **explained)
    for step, same in zip(steps, plain, strict=True):
        assert np.array_equal(step.x, same.x)
        assert np.array_equal(step.denoised, same.denoised)
        if step.index not in (1, total):
            with pytest.raises(AttributeError, match=rf"explain_steps=\[{step.index}\]"):
                _ = step.explanation
            continue
        found = step.explanation
        assert found.sources.shape == (2, *SHAPE[1:], 3, 3)
        # At the lowest noise a single image is left.
        assert [len(each) for each in found.images] == [
            min(2, np.count_nonzero(shares)) for shares in found.shares
        ]
        assert found.label_names == ("dot", "dash", "gap")
        assert np.abs(found.denoised - step.denoised).max() <= 1e-5
        assert not found.shares[0, 4:].any()
        assert not found.shares[1, :8].any()


def test_a_resumed_sample_explains_the_steps_that_remain(channel: grpc.Channel) -> None:
    stub = DenoiserServiceStub(channel)
    request = pb.SampleRequest(
        model="zeros",
        count=2,
        steps=5,
        sampler=pb.SAMPLER_DPMPP_2M,
        explain_steps=[2, 4],
        return_x=True,
        return_resume_token=True,
    )
    whole = list(stub.Sample(request, timeout=30))
    assert [len(step.explanations) for step in whole] == [0, 2, 0, 2, 0]
    # Other explanations may be requested than before: they do not change the images.
    request.resume_token = whole[2].resume_token
    request.explain_steps[:] = [3, 4, 5]
    rest = list(stub.Sample(request, timeout=30))
    assert [len(step.explanations) for step in rest] == [2, 2]
    assert rest[0].explanations[0] == whole[3].explanations[0]
    assert [step.x for step in rest] == [step.x for step in whole[3:]]


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("explain_steps: expected rising numbers of steps, from 1, got", {"explain_steps": [0]}),
        ("explain_steps: expected rising numbers of steps", {"explain_steps": [2, 2]}),
        ("explain_steps: expected at most 3, the number of steps, got 4", {"explain_steps": [4]}),
        ("explain_top: expected 1 to 16", {"explain_steps": [1], "explain_top": 17}),
        ("explain_images: expected 0 to 16", {"explain_steps": [1], "explain_images": -1}),
        ("explain_top: expected 0 without explain_steps", {"explain_top": 1}),
        ("explain_images: expected 0 without explain_steps", {"explain_images": 1}),
    ],
)
def test_a_bad_explanation_of_a_sample_is_named(
    channel: grpc.Channel, client: Client, message: str, change: dict[str, Any]
) -> None:
    request = pb.SampleRequest(model="zeros", steps=3, **change)
    with pytest.raises(grpc.RpcError) as caught:
        list(DenoiserServiceStub(channel).Sample(request, timeout=30))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert str(caught.value.details()).startswith(message)
    assert_serves(client)


def test_steps_of_a_model_without_a_bank_cannot_be_explained(client: Client) -> None:
    with pytest.raises(InvalidArgumentError, match=r"explain_steps: .* got it for wiener"):
        list(client.sample(model="wiener", steps=3, explain_steps=[1]))
    assert len(list(client.sample(model="wiener", steps=3))) == 3


def test_a_model_says_what_it_supports(client: Client) -> None:
    for model in client.models():
        assert model.has_gradients
        assert model.has_sources == (model.kind == "analytic")


def test_one_image_of_a_batch_has_the_bits_that_it_has_alone(client: Client) -> None:
    x, g = images(1), images(2)
    together = client.explain(x, model="zeros", sigma=SIGMA, top=16)
    _, products = client.vjp(x, g, model="zeros", sigma=SIGMA)
    for b in range(3):
        one = slice(b, b + 1)
        alone = client.explain(x[one], model="zeros", sigma=SIGMA[b], top=16)
        assert np.array_equal(alone.weights[0], together.weights[b])
        assert np.array_equal(alone.sources[0], together.sources[b])
        assert np.array_equal(
            client.vjp(x[one], g[one], model="zeros", sigma=SIGMA[b])[1], products[one]
        )


def test_a_model_without_a_bank_lists_the_models_that_explain(client: Client) -> None:
    x = np.zeros((1, 3, 32, 32), np.float32)
    with pytest.raises(ElsError, match="gaussian has no sources") as caught:
        client.explain(x, model="gaussian", sigma=1.0)
    assert caught.value.code == "FAILED_PRECONDITION"
    assert "circular, equivariant, ideal, local, valid, zeros" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("top", {"top": 17}),
        ("top", {"top": -1}),
        ("return_images", {"return_images": 17}),
        ("return_images", {"return_images": -1}),
        ("x.shape", {"x": pb.Tensor(dtype=pb.DTYPE_F32, shape=[1, 1, 6])}),
        ("windows", {"windows": [4]}),
        ("labels", {"labels": [9]}),
        ("level", {"level": pb.NoiseLevel()}),
        ("priority", {"priority": 9}),
    ],
)
def test_a_bad_field_of_explain_is_named(
    channel: grpc.Channel, client: Client, field: str, change: dict[str, Any]
) -> None:
    request = pb.ExplainRequest(model="zeros", level=pb.NoiseLevel(sigma=[1.0]))
    request.x.CopyFrom(message_of(images(1)))
    clear: Any = request.ClearField
    for name in change:
        clear(name)
    request.MergeFrom(pb.ExplainRequest(**change))
    with pytest.raises(grpc.RpcError) as caught:
        list(DenoiserServiceStub(channel).Explain(request, timeout=30))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert str(caught.value.details()).startswith(f"{field}: expected")
    assert_serves(client)


def test_the_client_rejects_what_cannot_be_sent(client: Client) -> None:
    with pytest.raises(InvalidArgumentError, match="top: expected an integer of at least 1, got 0"):
        client.explain(images(1), top=0, model="zeros", sigma=1.0)
    with pytest.raises(InvalidArgumentError, match="images: expected an integer of at least 0"):
        client.explain(images(1), images=-1, model="zeros", sigma=1.0)
    with pytest.raises(InvalidArgumentError, match="explain_top: expected an integer of at least"):
        client.sample(model="zeros", explain_steps=[1], explain_top=0)
    wrong: Any = [1.5]
    with pytest.raises(InvalidArgumentError, match="explain_steps: expected integers"):
        client.sample(model="zeros", explain_steps=wrong)
    with pytest.raises(InvalidArgumentError, match="cotangent: expected"):
        client.vjp(images(1), wrong, model="zeros", sigma=1.0)


def test_an_explanation_larger_than_a_message_is_rejected(tmp_path: Path) -> None:
    root = write_models(tmp_path / "models", {"wide": DOCUMENTS["local"].replace("tiny", "wide")})
    pixels = np.random.default_rng(0).integers(0, 256, (4, 1, 32, 32)).astype(np.uint8)
    save_bank(make_bank(pixels), root / "_banks" / "wide.safetensors")
    x = np.zeros((1, 1, 32, 32), np.float32)
    with (
        serving("--models", root, "--threads", 1, ELS_MAX_MESSAGE_BYTES="65536") as server,
        Client(server.target) as client,
    ):
        found = client.explain(x, model="wide", sigma=1.0, top=1)
        assert found.sources.shape == (1, 32, 32, 1, 3)
        # An unlabelled bank.
        assert (found.labels == -1).all()
        with pytest.raises(ElsError, match="top: expected a response of at most 65536") as caught:
            client.explain(x, model="wide", sigma=1.0, top=16)
        assert caught.value.code == "RESOURCE_EXHAUSTED"
        options: dict[str, Any] = {"model": "wide", "steps": 2, "explain_steps": [1]}
        (explained, _) = client.sample(explain_top=1, **options)
        assert explained.explanation.weights.shape == (1, 32, 32, 1)
        with pytest.raises(ElsError, match="count: expected a response of at most") as caught:
            list(client.sample(explain_top=1, count=4, **options))
        assert caught.value.code == "RESOURCE_EXHAUSTED"
