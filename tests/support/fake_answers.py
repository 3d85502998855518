"""Messages that the fake server answers with."""

from __future__ import annotations

from collections.abc import Mapping

import grpc
import numpy as np
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from els_proto.denoise.v1 import denoise_pb2 as pb

_READ = {pb.DTYPE_F32: "<f4", pb.DTYPE_F16: "<f2", pb.DTYPE_U8: "u1"}


def evidence(request: pb.VjpRequest | pb.JvpRequest) -> bytes:
    """Return evidence if it is requested and not that of this server."""
    return b"evidence" if request.return_evidence and request.evidence != b"evidence" else b""


def originality(index: int, nearest: int) -> pb.OriginalityResponse:
    """Return the report of an image that is a copy of the bank image of its index, of 60."""
    images = (np.arange(nearest) + index).astype("<i4")
    distances = np.arange(nearest)
    return pb.OriginalityResponse(
        index=index,
        nearest_images=images.tobytes(),
        nearest_labels=(images % 2).astype("<i4").tobytes(),
        distances=tensor(distances),
        gap_ratio=0.0,
        carlini_ratio=0.2,
        absent={"seams": "needs two neighbouring pixels with few sources"},
        largest_region=0.75,
        bank_fingerprint="fingerprint",
        bank_images=60,
    )


def explanation(index: int, shape: tuple[int, ...], top: int, images: int) -> pb.ExplainResponse:
    """Return that each pixel came from its own place of bank image ``index``, which is white."""
    _, channels, height, width = shape
    sources = np.full((height, width, top, 3), -1)
    places = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    sources[:, :, 0] = np.stack([np.full((height, width), index), *places], -1)
    weights = np.zeros((1, height, width, top))
    weights[..., 0] = 1
    return pb.ExplainResponse(
        index=index,
        denoised=tensor(np.ones(shape)),
        variance=tensor(np.zeros(shape)),
        entropy=tensor(np.zeros((1, height, width))),
        weights=tensor(weights),
        sources=sources.astype("<i4").tobytes(),
        share_images=np.array([index], "<i4").tobytes(),
        shares=tensor(np.ones(1)),
        share_labels=np.array([0], "<i4").tobytes(),
        bank_fingerprint="ab",
        label_names=["Boot", "Bag"] if index == 0 else [],
        bank_images=7,
        images=tensor(np.ones((1, channels, height, width))) if images else None,
        file_names=[f"{index}.png"],
    )


def values(x: pb.Tensor) -> np.ndarray:
    """Return the pixels of a tensor, bytes as the contract reads them."""
    array = np.frombuffer(x.data, _READ[x.dtype]).reshape(tuple(x.shape))
    return array / 127.5 - 1 if x.dtype == pb.DTYPE_U8 else array


def tensor(array: np.ndarray) -> pb.Tensor:
    """Return an f32 tensor."""
    data = array.astype("<f4").tobytes()
    return pb.Tensor(dtype=pb.DTYPE_F32, shape=array.shape, data=data)


def bad_request(violations: Mapping[str, str]) -> grpc.Status:
    """Return INVALID_ARGUMENT with details; its message names the first field alone."""
    detail = error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(field=field, description=text)
            for field, text in violations.items()
        ]
    )
    field, text = next(iter(violations.items()))
    return _status(code_pb2.INVALID_ARGUMENT, f"{field}: {text}", detail)


def try_again(after_s: float) -> grpc.Status:
    """Return RESOURCE_EXHAUSTED that says when there will be room."""
    detail = error_details_pb2.RetryInfo()
    detail.retry_delay.FromNanoseconds(round(after_s * 1e9))
    return _status(code_pb2.RESOURCE_EXHAUSTED, "the queue is full", detail)


def _status(code: int, message: str, detail: Message) -> grpc.Status:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status = status_pb2.Status(code=code, message=message, details=[packed])
    answer: grpc.Status = rpc_status.to_status(status)
    return answer
