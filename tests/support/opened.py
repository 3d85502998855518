"""Opens requests as the services do, for one model; what is kept of a request answers as it did."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.inference import grpc_service_pb2 as oip
from els_service.config import Limits
from els_service.denoisers.base import DenoiserInfo, Query
from els_service.engine.loaded_model import Statistics
from els_service.engine.registry import ModelVersion
from els_service.server.requests.envelopes import Envelopes
from els_service.server.requests.orders import Orders

_R = TypeVar("_R", pb.DenoiseRequest, oip.ModelInferRequest)


class _OneModel:
    def __init__(self, info: DenoiserInfo) -> None:
        self._entry = ModelVersion("m", 1, info, None, Statistics())

    def entry(self, name: str, version: str = "") -> ModelVersion:
        return self._entry


def open_denoise(request: pb.DenoiseRequest, info: DenoiserInfo, limits: Limits) -> Query:
    """Return the query of a request, which stays as it is."""
    opener = Envelopes(_one(info), limits, pb.DenoiseResponse, "denoised")
    first, again = (opener.open(_copy(request))[2] for _ in range(2))
    _assert_same(first, again)
    if (recognised := opener.recognise(request.SerializeToString())) is not None:
        _assert_same(first, opener.open(recognised)[2])
    return first


def open_inference(request: oip.ModelInferRequest, info: DenoiserInfo, limits: Limits) -> Query:
    """Return the query of a request, which stays as it is."""
    opener = Orders(_one(info), limits)
    (*_, first, name), (*_, again, _) = (opener.open(_copy(request)) for _ in range(2))
    assert name == request.id
    _assert_same(first, again)
    if (recognised := opener.recognise(request.SerializeToString())) is not None:
        *_, query, name = opener.open(recognised)
        assert name == request.id
        _assert_same(first, query)
    return first


def _one(info: DenoiserInfo) -> Any:
    return _OneModel(info)


def _copy(request: _R) -> _R:
    copy = type(request)()
    copy.CopyFrom(request)
    return copy


def _assert_same(one: Query, other: Query) -> None:
    pairs = [(one.pixels, other.pixels), (one.level.a, other.level.a), (one.level.s, other.level.s)]
    for mine, yours in [*pairs, (one.labels, other.labels), (one.windows, other.windows)]:
        np.testing.assert_array_equal(mine, yours)
    assert one.pixels is not other.pixels
    assert len(one.conditions) == len(other.conditions)
