"""Reports of originality in both clients, from a server whose images are all copies."""

from __future__ import annotations

import numpy as np
import pytest
from tests.support.fake_server import FakeDenoiser
from tests.support.twin import Twin

from els_client import InvalidArgumentError
from els_proto.denoise.v1 import denoise_pb2 as pb

X = np.zeros((2, 1, 4, 6), np.float32)


async def test_each_image_has_a_report(twin: Twin, fake: FakeDenoiser) -> None:
    found = await twin.call("originality", X, model="fashion-els", nearest=3, window=5)
    request = fake.requests[-1]
    assert isinstance(request, pb.OriginalityRequest)
    assert (request.nearest, list(request.windows)) == (3, [5])
    assert not request.HasField("level")
    assert [one.nearest.tolist() for one in found] == [[0, 1, 2], [1, 2, 3]]
    assert found[1].labels.tolist() == [1, 0, 1]
    assert found[0].distances.tolist() == [0, 1, 2]
    assert (found[0].gap_ratio, found[0].carlini_ratio) == (0, 0.2)
    assert (found[0].memorised, found[0].eidetic, found[0].copied) == (True, True, True)
    assert found[0].seams is None
    assert found[0].absent == {"seams": "needs two neighbouring pixels with few sources"}


async def test_a_level_of_the_sources_is_sent(twin: Twin, fake: FakeDenoiser) -> None:
    await twin.call("originality", X, model="fashion-els", sigma=0.5, label=[1, 2])
    request = fake.requests[-1]
    assert isinstance(request, pb.OriginalityRequest)
    assert list(request.level.sigma) == [0.5]
    assert list(request.labels) == [1, 2]


@pytest.mark.parametrize(("given", "model"), [(True, ""), ("other", "other")])
async def test_the_last_step_has_reports(
    twin: Twin, fake: FakeDenoiser, given: bool | str, model: str
) -> None:
    steps = await twin.steps(model="fashion-els", count=2, steps=3, originality=given)
    request = fake.requests[-1]
    assert isinstance(request, pb.SampleRequest)
    assert (request.return_originality, request.originality_model) == (True, model)
    assert [one.gap_ratio for one in steps[-1].originality] == [0, 0]
    with pytest.raises(AttributeError, match="only the last step"):
        _ = steps[0].originality


async def test_two_levels_are_rejected(twin: Twin) -> None:
    with pytest.raises(InvalidArgumentError, match="level: expected exactly one"):
        await twin.call("originality", X, model="fashion-els", sigma=1.0, time=0.5)
