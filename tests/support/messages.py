"""Questions as messages, and answers as arrays, for tests that need more than the client says."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from tests.support.models_folder import SHAPE

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceStub
from els_proto.inference import grpc_service_pb2 as oip
from els_proto.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub

Pixels = npt.NDArray[np.float32]


def denoiser(channel: grpc.aio.Channel) -> Any:
    """Return a stub of our own contract; its types know blocking channels alone."""
    return DenoiserServiceStub(channel)


def inference(channel: grpc.aio.Channel) -> Any:
    """Return a stub of the Open Inference Protocol."""
    return GRPCInferenceServiceStub(channel)


def images(*values: float) -> Pixels:
    """Return one image for each value, filled with it."""
    filled = np.empty((len(values), *SHAPE), np.float32)
    filled[:] = np.array(values).reshape(-1, 1, 1, 1)
    return filled


def asked(x: Pixels, **changes: Any) -> pb.DenoiseRequest:
    """Return a request about these images, of the slow model unless the changes say otherwise."""
    tensor = pb.Tensor(dtype=pb.DTYPE_F32, shape=x.shape, data=x.tobytes())
    fields: dict[str, Any] = {"model": "slow", "x": tensor, "level": pb.NoiseLevel(sigma=[1.0])}
    return pb.DenoiseRequest(**{**fields, **changes})


def array(tensor: pb.Tensor) -> Pixels:
    """Return the numbers of a float32 tensor."""
    return np.frombuffer(tensor.data, "<f4").reshape(tuple(tensor.shape))


async def images_computed(channel: grpc.aio.Channel, model: str) -> int:
    """Return how many images a model has computed."""
    request = oip.ModelStatisticsRequest(name=model)
    (statistics,) = (await inference(channel).ModelStatistics(request, timeout=30)).model_stats
    return int(statistics.inference_count)


def large(field: int, payload: bytes) -> bytes:
    """Return a message of one length-delimited field."""
    size, varint = len(payload), bytearray()
    while size >= 0x80:
        varint.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([field << 3 | 2, *varint, size]) + payload
