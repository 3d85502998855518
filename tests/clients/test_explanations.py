"""Explanations in both clients, from a server whose pixels all come from one bank image."""

from __future__ import annotations

import numpy as np
import pytest
from tests.support.fake_server import FakeDenoiser
from tests.support.twin import Twin

from els_client import Evidence, InvalidArgumentError
from els_proto.denoise.v1 import denoise_pb2 as pb

X = np.zeros((2, 1, 4, 6), np.float32)
SIZE = (4, 6)


async def test_an_explanation_has_one_row_for_each_image(twin: Twin, fake: FakeDenoiser) -> None:
    found = await twin.call("explain", X, model="fashion-els", sigma=1.0, top=3, images=2)
    request = fake.requests[-1]
    assert isinstance(request, pb.ExplainRequest)
    assert (request.top, request.return_images) == (3, 2)
    assert found.sources.dtype == np.int64
    assert found.sources.shape == (2, *SIZE, 3, 3)
    assert found.sources[1, 2, 5, 0].tolist() == [1, 2, 5]
    assert (found.sources[..., 1:, :] == -1).all()
    assert found.weights.shape == (2, *SIZE, 3)
    assert found.shares.tolist() == [[1, 0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0]]
    assert found.label_names == ("Boot", "Bag")
    assert found.labels.tolist() == [0, 0, -1, -1, -1, -1, -1]
    assert [list(one) for one in found.images] == [[0], [1]]
    assert found.images[0][0].shape == (1, *SIZE)
    assert found.file_names == {0: "0.png", 1: "1.png"}
    assert (found.effective_sources == 1).all()


async def test_without_images_an_explanation_has_none(twin: Twin) -> None:
    found = await twin.call("explain", X, model="fashion-els", sigma=1.0)
    assert found.images == ({}, {})


async def test_the_explained_steps_of_a_sample_have_explanations(
    twin: Twin, fake: FakeDenoiser
) -> None:
    options = {"model": "fashion-els", "count": 2, "steps": 4}
    steps = await twin.steps(explain_steps=[2, 4], explain_top=1, explain_images=1, **options)
    request = fake.requests[-1]
    assert isinstance(request, pb.SampleRequest)
    assert list(request.explain_steps) == [2, 4]
    assert (request.explain_top, request.explain_images) == (1, 1)
    for step in steps:
        if step.index in (2, 4):
            assert step.explanation.weights.shape == (2, *SIZE, 1)
        else:
            with pytest.raises(AttributeError, match=rf"explain_steps=\[{step.index}\]"):
                _ = step.explanation


@pytest.mark.parametrize("model", ["drains", "gives_way"])
async def test_a_resumed_sample_keeps_its_explanations(
    twin: Twin, fake: FakeDenoiser, model: str
) -> None:
    steps = await twin.steps(model=model, count=2, steps=6, explain_steps=[1, 3, 6])
    assert [step.index for step in steps] == [1, 2, 3, 4, 5, 6]
    assert fake.calls[model] > 1
    assert len([step for step in steps if step.index in (1, 3, 6) and step.explanation]) == 3


async def test_options_of_explanations_are_not_sent_without_steps(
    twin: Twin, fake: FakeDenoiser
) -> None:
    await twin.steps(model="fashion-els", steps=1, explain_top=3)
    request = fake.requests[-1]
    assert isinstance(request, pb.SampleRequest)
    assert (request.explain_top, request.explain_images) == (0, 0)


@pytest.mark.parametrize(
    ("field", "value"), [("top", 0), ("top", True), ("images", -1), ("images", 1.5)]
)
async def test_a_count_that_is_none_is_rejected(twin: Twin, field: str, value: object) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{field}: expected an integer"):
        await twin.call("explain", X, model="fashion-els", sigma=1.0, **{field: value})


@pytest.mark.parametrize("method", ["vjp", "jvp"])
async def test_evidence_is_kept_and_sent_back(twin: Twin, fake: FakeDenoiser, method: str) -> None:
    evidence = Evidence()
    for sent in (b"", b"evidence", b"evidence"):
        await twin.call(method, X, X, evidence=evidence, model="fashion-els", sigma=1.0)
        request = fake.requests[-1]
        assert isinstance(request, pb.VjpRequest | pb.JvpRequest)
        assert (request.evidence, request.return_evidence) == (sent, True)
        assert evidence.data == b"evidence"
    # As after a restart of the server.
    evidence.data = b"of another"
    await twin.call(method, X, X, evidence=evidence, model="fashion-els", sigma=1.0)
    assert evidence.data == b"evidence"
    await twin.call(method, X, X, model="fashion-els", sigma=1.0)
    request = fake.requests[-1]
    assert isinstance(request, pb.VjpRequest | pb.JvpRequest)
    assert (request.evidence, request.return_evidence) == (b"", False)


async def test_a_variance_is_requested_beside_the_images(twin: Twin, fake: FakeDenoiser) -> None:
    denoised, variance = await twin.call(
        "denoise_with_variance", X + 1, model="fashion-els", sigma=1.0
    )
    request = fake.requests[-1]
    assert isinstance(request, pb.DenoiseRequest)
    assert request.return_variance
    assert (denoised == 2).all()
    assert (variance == 0).all()
