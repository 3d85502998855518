"""Serialised requests for every server: a 12 KB image at a noise level.

The level is the same at every call or, as with samplers and restoration loops, never repeated.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
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


_calls = itertools.count()
_LEVELS, _STEP = 2**23, 2.0**-24
"""Number and distance of the levels from ``SIGMA`` up that float32 distinguishes."""
_SIGMA_MARK, _ID_MARK = 0.7310585786, "the id of a call"

Field = tuple[bytes, Callable[[int], bytes]]
"""Placeholder of a field in a template, and number of a call → bytes of the field."""


@dataclass(frozen=True, eq=False)
class Method:
    """A full gRPC method name with its request messages."""

    name: str
    parts: tuple[bytes, ...]
    """Bytes of every message between its fields."""
    fields: tuple[Callable[[int], bytes], ...] = ()

    @property
    def body(self) -> bytes:
        """A message at ``SIGMA``."""
        return self.message(0)

    def message(self, call: int | None = None) -> bytes:
        """Return the message of a call; of the next one if none is given."""
        number = next(_calls) if call is None else call
        message = self.parts[0]
        for field, part in zip(self.fields, self.parts[1:], strict=True):
            message += field(number) + part
        return message


def _method(name: str, template: bytes, *fields: Field) -> Method:
    """Return a method whose messages are a template with other values of some fields."""
    parts = [template]
    for mark, _ in fields:
        before, *after = parts.pop().split(mark)
        if len(after) != 1:
            raise ValueError(f"{name}: expected {mark!r} once, got {len(after)} times")
        parts += before, *after
    return Method(name, tuple(parts), tuple(value for _, value in fields))


def _level(layout: str, *, new: bool) -> Field:
    """Return the field of a level: another one at every call, or always ``SIGMA``."""
    pack = struct.Struct(layout).pack

    def value(call: int) -> bytes:
        return pack(SIGMA + call % _LEVELS * _STEP if new else SIGMA)

    return pack(_SIGMA_MARK), value


_ID: Field = (_ID_MARK.encode(), lambda call: b"%0*d" % (len(_ID_MARK), call))


def _denoise(name: str, *, new: bool = False) -> Method:
    tensor = denoise_pb2.Tensor(dtype=denoise_pb2.DTYPE_F32, shape=SHAPE, data=X.tobytes())
    level = denoise_pb2.NoiseLevel(sigma=[_SIGMA_MARK])
    request = denoise_pb2.DenoiseRequest(model=MODEL, x=tensor, level=level)
    return _method(name, request.SerializeToString(), _level("<d", new=new))


def _infer(*, new: bool = False) -> Method:
    """Return ``ModelInfer``; with an id where the level is new at every call."""
    request = grpc_service_pb2.ModelInferRequest(
        model_name=MODEL,
        raw_input_contents=[X.tobytes(), np.full((1, 1), _SIGMA_MARK, "<f4").tobytes()],
    )
    request.inputs.add(name="x", datatype="FP32", shape=SHAPE)
    request.inputs.add(name="sigma", datatype="FP32", shape=(1, 1))
    request.outputs.add(name="denoised")
    fields = [_level("<f", new=new)]
    if new:
        request.id = _ID_MARK
        fields.insert(0, _ID)
    name = "/inference.GRPCInferenceService/ModelInfer"
    return _method(name, request.SerializeToString(), *fields)


_DENOISER = "/denoise.v1.DenoiserService"
DENOISE = _denoise(f"{_DENOISER}/Denoise")
DENOISE_NEW = _denoise(f"{_DENOISER}/Denoise", new=True)
SCORE_NEW = _denoise(f"{_DENOISER}/Score", new=True)
DENOISE_STREAM = _denoise(f"{_DENOISER}/DenoiseStream")
STREAM_NEW = _denoise(f"{_DENOISER}/DenoiseStream", new=True)
MODEL_INFER = _infer()
INFER_NEW = _infer(new=True)
ECHO = _denoise("/baseline.Echo/Echo")
STREAMED = (DENOISE_STREAM, STREAM_NEW)
"""Methods whose requests are messages of one stream."""


def check(method: Method, answer: bytes, *, bare: bool) -> None:
    """Check the response of a server: wrong results are not timed.

    Args:
        method: called method.
        answer: serialised response.
        bare: whether the image itself is expected, not ``EXPECTED``.

    Raises:
        ValueError: It is another image.
    """
    expected = EXPECTED
    if method in (MODEL_INFER, INFER_NEW):
        message = grpc_service_pb2.ModelInferResponse.FromString(answer)
        (output,) = message.outputs
        typed = np.array(output.contents.fp32_contents, "<f4").tobytes()
        data = message.raw_output_contents[0] if message.raw_output_contents else typed
    elif method is ECHO:
        data = denoise_pb2.DenoiseRequest.FromString(answer).x.data
    elif method in STREAMED:
        data = denoise_pb2.DenoiseStreamResponse.FromString(answer).response.denoised.data
    elif method is SCORE_NEW:
        data = denoise_pb2.ScoreResponse.FromString(answer).score.data
        expected = (EXPECTED - X) / np.float32(SIGMA**2)
    else:
        data = denoise_pb2.DenoiseResponse.FromString(answer).denoised.data
    got = np.frombuffer(data, "<f4").reshape(SHAPE)
    if not (np.allclose(got, X) if bare else np.allclose(got, expected)):
        raise ValueError(f"{method.name}: a wrong answer, expected the denoised image; not timed")
