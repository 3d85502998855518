"""The pure decoders as fuzz targets: bytes in; an error of ours, or something fit to be served."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from google.protobuf.message import DecodeError
from safetensors.torch import save
from tests.support import networks
from tests.support.bad_inferences import SIGMA, X, infer
from tests.support.bad_requests import denoise, sample
from tests.support.models_folder import DOCUMENTS, LABELS, SHAPE, write_models
from tests.support.opened import open_denoise, open_inference

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.inference import grpc_service_pb2 as oip
from els_service.config import Limits
from els_service.denoisers.base import DenoiserInfo, Query
from els_service.denoisers.query_checks import check_query
from els_service.engine.loaded_model import Statistics
from els_service.engine.model_versions import ModelVersion
from els_service.errors import InvalidArgumentError, LoadError, ResourceExhaustedError
from els_service.repository import ModelRepository
from els_service.server.requests.resume_token import decode_token, encode_token, sealed

INFO = DenoiserInfo(
    kind="analytic", shape=SHAPE, label_count=LABELS, max_window=5, has_log_evidence=True
)
LIMITS = Limits(max_images=8, max_steps=10, max_message_bytes=1 << 16, max_pixels=1 << 20)
_ENTRY = ModelVersion("zeros", 1, INFO, None, Statistics())
_DRAWN = sample(seed=5, steps=4)
_STATISTICS = "kind: gaussian\nshape: [1, 6, 5]\nmean: mean.safetensors\nvariance: 1.0\n"
_WINDOWS = b"sigma: [0.1, 1.0]\nk: [1, 5]\n"


def query(data: bytes) -> None:
    """Decode a ``DenoiseRequest``."""
    try:
        decoded = open_denoise(pb.DenoiseRequest.FromString(data), INFO, LIMITS)
        check_query(INFO, decoded)
    except (DecodeError, InvalidArgumentError, ResourceExhaustedError):
        return
    _check(decoded)


def inference(data: bytes) -> None:
    """Decode a ``ModelInferRequest``."""
    try:
        request = oip.ModelInferRequest.FromString(data)
        decoded = open_inference(request, INFO, LIMITS)
        check_query(INFO, decoded)
    except (DecodeError, InvalidArgumentError, ResourceExhaustedError):
        return
    _check(decoded)


def _check(decoded: Query) -> None:
    batch = len(decoded)
    assert 1 <= batch <= LIMITS.max_images
    assert decoded.pixels.shape == (batch, *SHAPE)
    assert np.isfinite(decoded.pixels).all()
    sigma = decoded.level.sigma
    assert sigma.shape == decoded.labels.shape == decoded.windows.shape == (batch,)
    # Rounding of the square roots.
    assert ((sigma >= 0.999e-4) & (sigma <= 1.001e6)).all()


def token(data: bytes) -> None:
    """Decode a resume token, as it is and with the checksum of what it holds."""
    request = pb.SampleRequest.FromString(_DRAWN.SerializeToString())
    for token in (data, sealed(data[:-16])):
        request.resume_token = token
        try:
            resume = decode_token(request, _ENTRY, (1, *SHAPE), 4)
        except InvalidArgumentError:
            continue
        assert resume is None or (1 <= resume.index < 4 and bool(resume.state.isfinite().all()))


def sampling(data: bytes) -> None:
    """Decode a ``SampleRequest`` with its token."""
    try:
        request = pb.SampleRequest.FromString(data)
        decode_token(request, _ENTRY, (1, *SHAPE), 4)
    except (DecodeError, InvalidArgumentError):
        return


def _load(name: str, file: str, data: bytes) -> None:
    root = _root()
    (root / name / file).write_bytes(data)
    refused = ""
    try:
        denoiser = ModelRepository(root, implementation="torch").load(name)
        assert len(denoiser.info.shape) == 3
    except LoadError as error:
        refused = str(error)
    assert refused.isprintable(), refused


@cache
def _root() -> Path:
    root = write_models(Path(tempfile.mkdtemp(prefix="els-fuzz-")) / "models", DOCUMENTS)
    _write(root / "statistics", _STATISTICS)
    _write(root / "own", "kind: analytic\nmachine: els\nbank: bank.safetensors\n")
    networks.write_folder(root / "network", networks.config())
    return root


def _write(folder: Path, document: str) -> None:
    folder.mkdir()
    (folder / "model.yaml").write_text(document)


def document(data: bytes) -> None:
    """Load a model with this ``model.yaml``."""
    _load("zeros", "model.yaml", data)


def bank(data: bytes) -> None:
    """Load a model with this bank."""
    _load("own", "bank.safetensors", data)


def windows(data: bytes) -> None:
    """Load a model with this table of windows."""
    _load("circular", "windows.yaml", data)


def statistics(data: bytes) -> None:
    """Load a model with this file of statistics."""
    _load("statistics", "mean.safetensors", data)


def weights(data: bytes) -> None:
    """Load a network with these weights."""
    _load("network", "weights.safetensors", data)


def network(data: bytes) -> None:
    """Load a network with this ``model.yaml``."""
    _load("network", "model.yaml", data)


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        *(query, inference, token, sampling),
        *(document, bank, windows, statistics, weights, network),
    )
}


@cache
def seeds() -> dict[str, list[bytes]]:
    """Return good bytes for each target."""
    root = _root()
    state = torch.zeros(1, *SHAPE, dtype=torch.float64)
    resumed = encode_token(_DRAWN, _ENTRY, 2, state)
    drawn: Any = pb.SampleRequest.FromString(_DRAWN.SerializeToString())
    drawn.resume_token = resumed
    mean = {"mean": torch.zeros(SHAPE)}
    return {
        "query": [denoise(labels=[1], windows=[3]).SerializeToString()],
        "inference": [infer(X, SIGMA, outputs=["score"]).SerializeToString()],
        "token": [resumed],
        "sampling": [drawn.SerializeToString()],
        "document": [text.encode() for text in DOCUMENTS.values()],
        "bank": [(root / "_banks" / "tiny.safetensors").read_bytes()],
        "windows": [_WINDOWS],
        "statistics": [save(mean)],
        "weights": [(root / "network" / "weights.safetensors").read_bytes()],
        "network": [(root / "network" / "model.yaml").read_bytes()],
    }
