"""Reads requests as the services do, for one model; a form that is known reads as a new one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.inference import grpc_service_pb2 as oip
from els_service.config import Limits, Scheduling
from els_service.denoisers.base import Denoised, DenoiserInfo, Query
from els_service.denoisers.query_checks import check_query
from els_service.engine.loaded_model import LoadedModel, Statistics
from els_service.engine.model_versions import ModelVersion
from els_service.errors import InvalidArgumentError, ResourceExhaustedError
from els_service.server.requests.denoise import DenoiseMethod
from els_service.server.requests.inference import InferenceMethod

_R = TypeVar("_R", pb.DenoiseRequest, oip.ModelInferRequest)


class StandIn:
    """A denoiser that checks like any other and returns the pixels."""

    def __init__(self, info: DenoiserInfo) -> None:
        self.info = info

    def check(self, query: Query) -> None:
        check_query(self.info, query)

    def predict_seconds(self, query: Query) -> float:
        return 0.0

    def denoise(self, query: Query) -> Denoised:
        return Denoised(query.pixels, None)


class OneModel:
    """Stands for a registry; the model may be loaded again, or be unloaded."""

    def __init__(self, info: DenoiserInfo, *, loaded: bool = True) -> None:
        self.info, self.loaded = info, loaded

    def find(self, name: str, version: str = "") -> ModelVersion:
        model = LoadedModel(name, 1, {"cpu": StandIn(self.info)}, Scheduling())
        return ModelVersion(name, 1, self.info, model if self.loaded else None, Statistics())


def open_denoise(request: pb.DenoiseRequest, info: DenoiserInfo, limits: Limits) -> Query:
    """Return the query of a request, which stays as it is."""
    models: Any = OneModel(info, loaded=False)
    method = DenoiseMethod(models, limits, pb.DenoiseResponse, "denoised")
    *_, query, checked = method.read(_copy(request))
    assert not checked
    models.loaded = True
    for _ in range(2):
        # It may not fit the model now, which the engine would check later.
        _assert_same(query, lambda: method.read(_copy(request))[2], info)
    return query


def open_inference(request: oip.ModelInferRequest, info: DenoiserInfo, limits: Limits) -> Query:
    """Return the query of a request, which stays as it is."""
    models: Any = OneModel(info, loaded=False)
    method = InferenceMethod(models, limits)
    *_, query, checked = method.read(_copy(request))
    assert not checked
    models.loaded = True
    for _ in range(2):
        _assert_same(query, lambda: method.read(_copy(request))[2], info)
    return query


def _copy(request: _R) -> _R:
    copy = type(request)()
    copy.CopyFrom(request)
    return copy


def _assert_same(one: Query, read: Callable[[], Query], info: DenoiserInfo) -> None:
    """Check that a query is read again as it was, or is refused as the model refuses it."""
    refused = _refusal(lambda: check_query(info, one))
    if refused:
        assert _refusal(read) == refused
        return
    other = read()
    pairs = [(one.pixels, other.pixels), (one.level.a, other.level.a), (one.level.s, other.level.s)]
    for mine, yours in [*pairs, (one.labels, other.labels), (one.windows, other.windows)]:
        np.testing.assert_array_equal(mine, yours)
    assert one.pixels is not other.pixels
    assert len(one.conditions) == len(other.conditions)


def _refusal(action: Callable[[], object]) -> str:
    try:
        action()
    except (InvalidArgumentError, ResourceExhaustedError) as error:
        return str(error)
    return ""
