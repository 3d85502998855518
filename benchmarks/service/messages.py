"""The one question that every server is asked: a 12 KB image at one noise level, as ready bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from els_proto.denoise.v1 import denoise_pb2
from els_proto.inference import grpc_service_pb2

SHAPE = (1, 3, 32, 32)
SIGMA, VARIANCE = 0.5, 0.25
MODEL = "gaussian"
MODEL_YAML = f"kind: gaussian\nshape: [3, 32, 32]\nmean: 0.0\nvariance: {VARIANCE}\n"

X = np.random.default_rng(0).standard_normal(SHAPE).astype("<f4")
EXPECTED = X * np.float32(VARIANCE / (VARIANCE + SIGMA**2))
"""The posterior mean of a Gaussian prior around 0: v / (v + σ²) · x."""


@dataclass(frozen=True)
class Method:
    """A full gRPC method name with the bytes that it is sent."""

    name: str
    body: bytes


def _denoise_body() -> bytes:
    tensor = denoise_pb2.Tensor(dtype=denoise_pb2.DTYPE_F32, shape=SHAPE, data=X.tobytes())
    level = denoise_pb2.NoiseLevel(sigma=[SIGMA])
    return denoise_pb2.DenoiseRequest(model=MODEL, x=tensor, level=level).SerializeToString()


def _infer_body() -> bytes:
    request = grpc_service_pb2.ModelInferRequest(
        model_name=MODEL,
        raw_input_contents=[X.tobytes(), np.full((1, 1), SIGMA, "<f4").tobytes()],
    )
    request.inputs.add(name="x", datatype="FP32", shape=SHAPE)
    request.inputs.add(name="sigma", datatype="FP32", shape=(1, 1))
    request.outputs.add(name="denoised")
    return request.SerializeToString()


DENOISE = Method("/denoise.v1.DenoiserService/Denoise", _denoise_body())
DENOISE_STREAM = Method("/denoise.v1.DenoiserService/DenoiseStream", DENOISE.body)
MODEL_INFER = Method("/inference.GRPCInferenceService/ModelInfer", _infer_body())
ECHO = Method("/baseline.Echo/Echo", DENOISE.body)


def check(method: Method, answer: bytes, *, bare: bool) -> None:
    """Refuse a server that answers something else: it is not to be timed.

    Args:
        method: what was asked.
        answer: its bytes.
        bare: whether the answer is to be the image itself, not the ``EXPECTED`` one.

    Raises:
        ValueError: It is another image.
    """
    if method is MODEL_INFER:
        message = grpc_service_pb2.ModelInferResponse.FromString(answer)
        (output,) = message.outputs
        typed = np.array(output.contents.fp32_contents, "<f4").tobytes()
        data = message.raw_output_contents[0] if message.raw_output_contents else typed
    elif method is ECHO:
        data = denoise_pb2.DenoiseRequest.FromString(answer).x.data
    elif method is DENOISE:
        data = denoise_pb2.DenoiseResponse.FromString(answer).denoised.data
    else:
        data = denoise_pb2.DenoiseStreamResponse.FromString(answer).response.denoised.data
    got = np.frombuffer(data, "<f4").reshape(SHAPE)
    if not (np.allclose(got, X) if bare else np.allclose(got, EXPECTED)):
        raise ValueError(f"{method.name}: a wrong answer is not to be timed")
