"""Resume tokens: checkpoints of trajectories, opaque and bound to their request.

    "els2" · digest of request and model (16) · seed u64 · step u32 · state f64 [count, C, H, W]
    (for dpmpp_2m [2·count, C, H, W]) · checksum of all that (16)

Little-endian. A token is not secret and not trusted: all of it is validated. The checksum detects
damage; it is no signature, as a caller can compute it for another state.
"""

from __future__ import annotations

import hashlib
import math
import struct

import numpy as np
import torch
from torch import Tensor

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.denoisers.samplers import Resume
from els_service.engine.model_versions import ModelVersion
from els_service.errors import InvalidArgumentError
from els_service.server.requests.sample import CHURN_OPTIONS

_HEAD = struct.Struct("<4s16sQI")
_MAGIC = b"els2"
_CHECKSUM_BYTES = 16
_LIBRARIES = ("openvino", "onnxruntime")
"""Engines of which the last bits depend on version and threads, with the same batches too."""
_MAX_STATE = 1e12
"""Maximum of a number of the state; in heun's scale it reaches σ · noise."""


def encode_token(
    request: pb.SampleRequest, model: ModelVersion, index: int, state: Tensor
) -> bytes:
    """Return the token of a trajectory after step ``index``.

    Args:
        request: request of the trajectory.
        model: its model.
        index: number of the last step taken.
        state: state after that step, float64 of ``samplers.state_shape``.
    """
    head = _HEAD.pack(_MAGIC, _digest(request, model), request.seed, index)
    return sealed(head + state.contiguous().numpy().astype("<f8", copy=False).tobytes())


def sealed(content: bytes) -> bytes:
    """Return the content with its checksum appended."""
    return content + hashlib.sha256(content).digest()[:_CHECKSUM_BYTES]


def decode_token(
    request: pb.SampleRequest, model: ModelVersion, shape: tuple[int, ...], steps: int
) -> Resume | None:
    """Return the starting point of a resumed trajectory; None for a request without a token.

    Args:
        request: request with the token.
        model: its model.
        shape: shape of the state, by ``samplers.state_shape``.
        steps: number of steps of the trajectory.

    Raises:
        InvalidArgumentError: Damaged, or not a token of this request to this version and content of
            the model.
    """
    token = request.resume_token
    if not token:
        return None
    size = _HEAD.size + 8 * math.prod(shape) + _CHECKSUM_BYTES
    if len(token) != size:
        raise InvalidArgumentError("resume_token", f"{size} bytes", f"{len(token)} bytes")
    content = token[:-_CHECKSUM_BYTES]
    if token != sealed(content):
        raise InvalidArgumentError("resume_token", "bytes as they were sent", "changed ones")
    magic, digest, seed, index = _HEAD.unpack_from(content)
    if magic != _MAGIC or digest != _digest(request, model) or seed != request.seed:
        expected = "a token of this very request, answered by the same model"
        raise InvalidArgumentError("resume_token", expected, "another")
    if not 1 <= index < steps:
        raise InvalidArgumentError("resume_token", f"a step from 1 to {steps - 1}", index)
    state = np.frombuffer(bytearray(content[_HEAD.size :]), "<f8").reshape(shape)
    if not np.all(np.abs(state) <= _MAX_STATE):
        raise InvalidArgumentError("resume_token", "a finite state", "NaN, infinity or more")
    return Resume(index, torch.from_numpy(state.astype(np.float64, copy=False)))


def _digest(request: pb.SampleRequest, model: ModelVersion) -> bytes:
    info = model.info
    drawn = (
        *(request.model, request.count, request.seed, request.steps, request.sampler),
        *(list(request.labels), list(request.windows)),
        *(request.HasField("eta"), request.eta, request.churn, request.guidance),
        *(request.timesteps, request.start_time, list(request.times), request.first_image),
        *((request.HasField(name), getattr(request, name)) for name in CHURN_OPTIONS),
        # A reloaded version may be another model.
        *(model.version, model.content),
        *(info.kind, info.machine, info.padding, info.schedule, info.shape),
        *(info.window, info.bank.fingerprint if info.bank else ""),
        # Tokens of earlier releases, which have no other sizes and folds, remain valid.
        *((request.height, request.width) if request.height or request.width else ()),
        *((info.fold,) if info.fold else ()),
        *((request.tileable, request.symmetric, info.scales) if info.scales else ()),
        # Without the promise of bits they may differ.
        *((info.implementation,) if info.batch_invariant and info.engine in _LIBRARIES else ()),
        *(("scaled", request.window_scale) if request.window_scale else ()),
    )
    digest = hashlib.sha256(repr(drawn).encode())
    given = [request.conditioning, request.unconditional, request.start]
    if request.HasField("mask"):
        given.append(request.mask)
    for tensor in given:
        digest.update(repr((tensor.dtype, list(tensor.shape))).encode())
        digest.update(tensor.data)
    return digest.digest()[:16]
