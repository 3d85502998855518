"""What is kept of a request serves the next one like it, and no other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.support.bad_requests import denoise
from tests.support.models_folder import LABELS, SHAPE

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.config import Limits
from els_service.denoisers.base import Denoised, DenoiserInfo
from els_service.engine.loaded_model import Statistics
from els_service.engine.registry import ModelVersion
from els_service.errors import InvalidArgumentError
from els_service.server.requests import kept
from els_service.server.requests.envelopes import DenoiseEnvelope, Envelopes

INFO = DenoiserInfo(kind="analytic", shape=SHAPE, label_count=LABELS, has_log_evidence=True)
LIMITS = Limits(max_images=8, max_steps=10, max_message_bytes=1 << 16, max_pixels=1 << 20)


class OneModel:
    """Stands for ``Models``; the model may be loaded anew."""

    def __init__(self) -> None:
        self.info = INFO

    def entry(self, name: str, version: str = "") -> ModelVersion:
        return ModelVersion(name, 1, self.info, None, Statistics())


@pytest.fixture
def models() -> OneModel:
    return OneModel()


@pytest.fixture
def opener(models: Any) -> Envelopes:
    return Envelopes(models, LIMITS, pb.DenoiseResponse, "denoised")


def opened(opener: Envelopes, request: pb.DenoiseRequest) -> DenoiseEnvelope:
    _, envelope, _ = opener.open(request)
    return envelope


def test_one_envelope_serves_requests_that_differ_in_their_pixels_alone(opener: Envelopes) -> None:
    other = denoise()
    other.x.data = np.full(30, 0.5, "<f4").tobytes()
    _, first, blank = opener.open(denoise())
    _, second, half = opener.open(other)
    assert first is second
    assert (blank.pixels.max(), half.pixels.max()) == (0, 0.5)
    assert half.pixels.flags.writeable


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "other"},
        {"version": "1"},
        {"level": pb.NoiseLevel(sigma=[2.0])},
        {"labels": [1]},
        {"windows": [3]},
        {"output_dtype": pb.DTYPE_F16},
        {"return_log_evidence": True},
        {"priority": 1},
        {"timeout_s": 2.0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_request_that_differs_in_anything_else_has_its_own(
    opener: Envelopes, changes: dict[str, Any]
) -> None:
    assert opened(opener, denoise()) is not opened(opener, denoise(**changes))


def test_pixels_of_a_known_envelope_are_checked_all_the_same(opener: Envelopes) -> None:
    opened(opener, denoise())
    bad = denoise()
    bad.x.data = np.full(30, np.nan, "<f4").tobytes()
    with pytest.raises(InvalidArgumentError, match="finite pixels"):
        opener.open(bad)
    bad = denoise()
    bad.x.data = bytes(119)
    with pytest.raises(InvalidArgumentError, match="expected 120 bytes"):
        opener.open(bad)


def test_a_request_is_recognised_from_the_third_on_and_has_its_own_pixels(
    opener: Envelopes,
) -> None:
    data = denoise().SerializeToString()
    assert opener.recognise(data) is None
    first, second = (opened(opener, denoise()) for _ in range(2))
    assert first is second
    half = denoise()
    half.x.data = np.full(30, 0.5, "<f4").tobytes()
    recognised = opener.recognise(half.SerializeToString())
    assert recognised is not None
    assert recognised.model == half.model
    _, envelope, query = opener.open(recognised)
    assert (envelope, recognised.pixels.nbytes) == (first, 0)
    assert (query.pixels == 0.5).all()
    assert opener.recognise(denoise(labels=[1]).SerializeToString()) is None
    half.x.data = np.full(30, np.inf, "<f4").tobytes()
    bad = opener.recognise(half.SerializeToString())
    assert bad is not None
    with pytest.raises(InvalidArgumentError, match="finite pixels"):
        opener.open(bad)


@pytest.mark.parametrize("dtype", [pb.DTYPE_F32, pb.DTYPE_F16, pb.DTYPE_BF16])
def test_an_answer_is_the_same_message_before_and_after_it_is_known(
    opener: Envelopes, dtype: pb.DType.ValueType
) -> None:
    answer = Denoised(np.random.default_rng(0).normal(size=(1, *SHAPE)).astype(np.float32), None)
    envelope = opened(opener, denoise(output_dtype=dtype))
    first = opener.answer(envelope, answer.pixels, answer)
    opened(opener, denoise(output_dtype=dtype))
    again = opener.answer(envelope, answer.pixels, answer)
    assert isinstance(first, pb.DenoiseResponse)
    assert isinstance(again, bytes)
    assert pb.DenoiseResponse.FromString(again) == first


def test_a_request_to_a_model_that_is_loaded_anew_is_not_recognised(
    models: OneModel, opener: Envelopes
) -> None:
    for _ in range(2):
        opened(opener, denoise())
    data = denoise().SerializeToString()
    assert opener.recognise(data) is not None
    models.info = replace(INFO, has_log_evidence=False)
    assert opener.recognise(data) is None


def test_a_model_that_is_loaded_anew_judges_anew(models: OneModel, opener: Envelopes) -> None:
    request = denoise(return_log_evidence=True)
    opened(opener, denoise(return_log_evidence=True))
    models.info = replace(INFO, has_log_evidence=False)
    with pytest.raises(InvalidArgumentError, match="return_log_evidence"):
        opener.open(request)


def test_what_is_kept_is_bounded(opener: Envelopes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_KEPT", 3)
    for sigma in range(1, 9):
        opened(opener, denoise(level=pb.NoiseLevel(sigma=[sigma])))
        assert len(opener._kept._kept) <= 3
    first = opened(opener, denoise(model="m" * kept.KEY_BYTES))
    assert opened(opener, denoise(model="m" * kept.KEY_BYTES)) is not first


def test_what_queries_share_cannot_be_written(opener: Envelopes) -> None:
    _, _, query = opener.open(denoise(labels=[1]))
    for shared in (query.level.a, query.level.s, query.labels, query.windows):
        assert not shared.flags.writeable
