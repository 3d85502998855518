"""Reports of originality from a real server, against the measures of the library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tests.support.models_folder import (
    DOCUMENTS,
    LABELLED,
    SHAPE,
    WITH_EVIDENCE,
    tiny_bank,
    write_models,
)
from tests.support.processes import serving
from tests.support.twin import Twin

from els_client import Client, ElsError, InvalidArgumentError, Originality
from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceStub
from els_service.denoisers.banks import make_bank, save_bank
from els_service.denoisers.base import make_query
from els_service.denoisers.explanations import Explainable
from els_service.denoisers.levels import from_alpha_bar, from_sigma
from els_service.denoisers.originality import MEASURES, Report, report
from els_service.repository import ModelRepository


def images(seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).uniform(-1, 1, (3, *SHAPE)).astype(np.float32)


def same(found: Originality, want: Report, nearest: int) -> None:
    assert found.nearest.tolist() == want.nearest[:nearest].tolist()
    assert found.distances.tolist() == want.distances[:nearest].tolist()
    assert {name: getattr(found, name) for name in MEASURES} == {
        name: getattr(want, name) for name in MEASURES
    }
    assert found.absent == want.absent
    assert found.bank_fingerprint == tiny_bank().fingerprint
    assert found.labels.tolist() == tiny_bank().labels[found.nearest].tolist()


def wanted(
    models: Path, model: str, x: np.ndarray[Any, Any], labels: list[int], **level: float
) -> list[Report]:
    denoiser = ModelRepository(models).load(model)
    if not isinstance(denoiser, Explainable):
        return [report(image, tiny_bank()) for image in x]
    a = level.get("alpha_bar", 1.0) ** 0.5
    at = from_alpha_bar([level["alpha_bar"]]) if level else from_sigma([0.1])
    largest = denoiser.info.max_window
    windows = [min(11, largest)] if largest else []
    found = denoiser.explain(make_query(np.float32(a) * x, at, labels, windows), 16)
    wraps = denoiser.info.padding == "circular"
    rows = zip(x, found.sources, found.weights, found.shares, strict=True)
    return [report(image, tiny_bank(), *sources, wraps=wraps) for image, *sources in rows]


@pytest.mark.parametrize("model", LABELLED)
async def test_reports_are_those_of_the_measures(twin: Twin, models: Path, model: str) -> None:
    x, labels = images(1), [-1, 0, 2]
    options: dict[str, Any] = {"model": model, "label": labels}
    for level in ({}, {"alpha_bar": 0.5}):
        found = await twin.call("originality", x, nearest=5, **options, **level)
        for one, want in zip(found, wanted(models, model, x, labels, **level), strict=True):
            same(one, want, 5)
            assert (one.gap_ratio is None, one.carlini_ratio) == (False, None)
            assert one.absent["carlini_ratio"].endswith("51 images, this has 12")
            assert (one.seams is None) <= ("seams" in one.absent)


async def test_a_bank_image_is_memorised_copied_and_in_place(twin: Twin) -> None:
    x = tiny_bank().pixels()[4:5].numpy()
    (found,) = await twin.call("originality", x, model="zeros", nearest=1)
    assert found.nearest.tolist() == [4]
    assert (found.gap_ratio, found.memorised, found.copied) == (0, True, True)
    assert (found.largest_image, found.sources_of_90, found.eidetic) == (4, 1, None)
    assert found.in_place == pytest.approx(1)
    assert found.seams == pytest.approx(0)


@pytest.mark.parametrize("model", [*WITH_EVIDENCE, "wiener"])
async def test_the_last_step_of_a_sample_has_the_reports_of_its_images(
    twin: Twin, model: str
) -> None:
    options: dict[str, Any] = {"model": model, "count": 2, "steps": 3, "label": [0, 2]}
    plain = await twin.steps(**options)
    steps = await twin.steps(originality=True, **options)
    assert [np.array_equal(a.x, b.x) for a, b in zip(steps, plain, strict=True)] == [True] * 3
    again = await twin.call("originality", steps[-1].x, model=model, label=[0, 2])
    other = (await twin.steps(originality="local", **options))[-1].originality
    local = await twin.call("originality", steps[-1].x, model="local", label=[0, 2])
    for got, want in zip((*steps[-1].originality, *other), (*again, *local), strict=True):
        assert {name: getattr(got, name) for name in MEASURES} == {
            name: getattr(want, name) for name in MEASURES
        }
    for step in (steps[0], plain[-1]):
        with pytest.raises(AttributeError, match="originality=True"):
            _ = step.originality


def test_a_resumed_sample_has_the_reports(channel: grpc.Channel) -> None:
    stub = DenoiserServiceStub(channel)
    request = pb.SampleRequest(
        model="zeros", steps=3, return_resume_token=True, return_originality=True
    )
    whole = list(stub.Sample(request, timeout=30))
    request.resume_token = whole[1].resume_token
    (last,) = stub.Sample(request, timeout=30)
    assert len(last.originality) == 1
    assert last.originality == whole[-1].originality


def test_a_bank_that_knows_its_files_names_the_nearest(tmp_path: Path) -> None:
    root = write_models(tmp_path / "models", {"zeros": DOCUMENTS["zeros"]})
    bank = tiny_bank(named=True)
    save_bank(bank, root / "_banks" / "tiny.safetensors")
    assert bank.file_names is not None
    with serving("--models", root, "--threads", 1) as server, Client(server.target) as client:
        (found,) = client.originality(images(1)[:1], model="zeros")
    assert found.file_names == tuple(bank.file_names[i] for i in found.nearest)


def test_a_bank_of_one_picture_says_which_measures_it_lacks(tmp_path: Path) -> None:
    document = DOCUMENTS["zeros"]
    sized = f"{document}window: 3\nsizes: any\n"
    root = write_models(tmp_path / "models", {"one": document, "any": sized})
    picture = tiny_bank().images[:1]
    save_bank(make_bank(picture), root / "_banks" / "tiny.safetensors")
    with serving("--models", root, "--threads", 1) as server, Client(server.target) as client:
        (found,) = client.originality(picture, model="one")
        (larger,) = client.originality(np.zeros((1, 1, 9, 7), np.float32), model="any")
    assert set(found.absent) >= {"gap_ratio", "carlini_ratio"}
    assert (found.memorised, found.copied, found.largest_share) == (None, True, 1)
    assert larger.absent["gap_ratio"] == "needs a bank of images of its size, 1×9×7"
    assert larger.largest_share == 1


def test_bad_requests_say_what_is_wrong_and_harm_nothing(client: Client) -> None:
    small = np.zeros((1, 1, 5, 5), np.float32)
    with pytest.raises(InvalidArgumentError, match=r"x: expected shape \[B, 1, 6, 5\], got"):
        client.originality(small, model="zeros")
    rgb = np.zeros((1, 3, 32, 32), np.float32)
    with pytest.raises(
        ElsError, match=r"gaussian has no bank images; models that have: .*zeros"
    ) as error:
        client.originality(rgb, model="gaussian")
    assert error.value.code == "FAILED_PRECONDITION"
    with pytest.raises(InvalidArgumentError, match="nearest: expected 1 to 50, or 0, got 51"):
        client.originality(images(1), model="zeros", nearest=51)
    with pytest.raises(InvalidArgumentError, match="nearest: expected an integer"):
        client.originality(images(1), model="zeros", nearest=0)
    with pytest.raises(InvalidArgumentError, match="guidance: expected none"):
        client.originality(images(1), model="zeros", guidance=2.0)
    with pytest.raises(InvalidArgumentError, match="return_originality: expected a model with a"):
        list(client.sample(model="gaussian", originality=True))
    with pytest.raises(InvalidArgumentError, match="originality_model: expected a bank of images"):
        list(client.sample(model="gaussian", originality="zeros"))
    assert len(client.originality(images(1), model="zeros")) == 3


def test_a_name_without_the_request_is_rejected(channel: grpc.Channel) -> None:
    request = pb.SampleRequest(model="zeros", steps=2, originality_model="local")
    with pytest.raises(grpc.RpcError, match="originality_model: expected unset without"):
        list(DenoiserServiceStub(channel).Sample(request, timeout=30))
