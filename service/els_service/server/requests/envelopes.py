"""Requests of ``denoise.v1`` as envelopes and queries, and the answers to them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from torch import Tensor

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.config import Limits
from els_service.denoisers.base import Denoised, Query, make_query
from els_service.engine.registry import ModelRegistry, ModelVersion
from els_service.errors import InvalidArgumentError
from els_service.server.requests import tensors
from els_service.server.requests.frames import frame_of
from els_service.server.requests.kept import KEY_BYTES, Envelope, Kept, Recognised

_Answer = pb.DenoiseResponse | pb.ScoreResponse


@dataclass(eq=False, slots=True)
class DenoiseEnvelope(Envelope):
    """A ``DenoiseRequest`` or ``ScoreRequest`` without its pixels."""

    dtype: int
    """In which its pixels come."""
    head: bytes
    """The tensor of its answer, but for the data."""
    output_dtype: pb.DType.ValueType
    log_evidence: bool
    """Whether it is wanted."""

    def query(self, data: bytes | memoryview) -> Query:
        """Return the query of the pixels in ``data``.

        Raises:
            InvalidArgumentError: The byte count or a pixel is wrong.
        """
        return self.ask(tensors.decode_pixels(data, self.dtype, "x", self.blank.pixels.shape))

    def write(self, message: pb.Tensor, answer: Tensor | npt.NDArray[np.float32]) -> None:
        """Fill an empty message with the images [B, C, H, W] that answer the request."""
        # Parsing what is always the same takes half the time of writing it.
        message.MergeFromString(self.head)
        message.data = tensors.bytes_of(answer, self.output_dtype)


class Envelopes:
    """Opens the requests of one method.

    Args:
        models: that are asked.
        limits: of requests.
        answer: the class of the method's answers.
        tensor: the field of theirs that holds what is asked for.
    """

    def __init__(
        self, models: ModelRegistry, limits: Limits, answer: type[_Answer], tensor: str
    ) -> None:
        self._models, self._limits = models, limits
        self._answer, self._tensor = answer, tensor
        self._kept: Kept[DenoiseEnvelope] = Kept(models)
        self.recognise = self._kept.recognise

    def open(
        self, request: tensors.Request | Recognised[DenoiseEnvelope]
    ) -> tuple[ModelVersion, DenoiseEnvelope, Query]:
        """Return a request's model, envelope and query; takes the pixels out of the request.

        Raises:
            NotFoundError, UnavailableError: No such model.
            InvalidArgumentError, ResourceExhaustedError: As ``seal`` and ``DenoiseEnvelope.query``.
        """
        if isinstance(request, Recognised):
            entry, envelope, pixels = request.open()
            return entry, envelope, envelope.query(pixels)
        data = request.x.data
        request.x.ClearField("data")
        # A condition is as large as an image.
        key = b"" if request.HasField("conditioning") else request.SerializeToString()
        kept = self._kept.get(key)
        if kept is not None:
            entry, envelope = kept
            if not envelope.known:
                self._learn(request, envelope, len(data))
        else:
            entry = self._models.entry(request.model, request.version)
            envelope = seal(request, len(data), entry, self._limits)
            if 0 < len(key) <= KEY_BYTES:
                self._kept.put(key, envelope)
        return entry, envelope, envelope.query(data)

    def _learn(self, request: tensors.Request, envelope: DenoiseEnvelope, size: int) -> None:
        def asks(pixels: bytes) -> bytes:
            request.x.data = pixels
            return request.SerializeToString()

        def answers(pixels: bytes) -> bytes:
            message = self._answer()
            tensor: pb.Tensor = getattr(message, self._tensor)
            tensor.MergeFromString(envelope.head)
            tensor.data = pixels
            data: bytes = message.SerializeToString()
            return data

        self._kept.learn(envelope, asks, size)
        request.x.ClearField("data")
        if not envelope.log_evidence:
            of_answer = envelope.blank.pixels.size * tensors.output_size(envelope.output_dtype)
            envelope.frame = frame_of(answers, of_answer)

    def answer(
        self,
        envelope: DenoiseEnvelope,
        pixels: Tensor | npt.NDArray[np.float32],
        denoised: Denoised,
    ) -> _Answer | bytes:
        """Return the answer to a request, or its bytes.

        Args:
            envelope: of the request.
            pixels: what was asked for, [B, C, H, W].
            denoised: with the evidence, which may be asked for, too.
        """
        if envelope.frame is not None:
            return envelope.frame.around(tensors.bytes_of(pixels, envelope.output_dtype))
        message = self._answer()
        envelope.write(getattr(message, self._tensor), pixels)
        if envelope.log_evidence:
            tensors.write_evidence(message.log_evidence, denoised)
        return message


def seal(
    request: tensors.Request, size: int, entry: ModelVersion, limits: Limits
) -> DenoiseEnvelope:
    """Return the envelope of a request with ``size`` bytes of pixels to a model.

    Raises:
        InvalidArgumentError: A field is wrong, or evidence is asked of a model without.
        ResourceExhaustedError: Too many images or pixels, or the answer would exceed the limit.
    """
    info = entry.info
    shape = tensors.decode_shape(request.x, size, "x", limits)
    if request.return_log_evidence and not info.has_log_evidence:
        raise InvalidArgumentError("return_log_evidence", "false for this model", "true")
    answer = tensors.answer_size(shape, request.output_dtype, request.return_log_evidence)
    tensors.check_answer_size("x.shape", answer, limits)
    blank = make_query(
        _black(shape),
        tensors.decode_level(request.level, info.levels, limits),
        tensors.bounded("labels", request.labels, limits),
        tensors.decode_windows(tensors.bounded("windows", request.windows, limits)),
        tensors.decode_conditions(request, info, shape[0]),
    )
    return DenoiseEnvelope(
        info,
        share(blank, entry),
        request.model,
        request.version,
        blank,
        request.priority,
        request.timeout_s,
        request.x.dtype,
        _head(request.output_dtype or pb.DTYPE_F32, shape),
        request.output_dtype,
        request.return_log_evidence,
    )


# Levels are new at every call, shapes are not.
@lru_cache(1024)
def _black(shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Return read-only zeros that take no memory."""
    return np.broadcast_to(np.float32(0), shape)


@lru_cache(1024)
def _head(dtype: pb.DType.ValueType, shape: tuple[int, ...]) -> bytes:
    return pb.Tensor(dtype=dtype, shape=shape).SerializeToString()


def share(blank: Query, entry: ModelVersion) -> bool:
    """Make read-only what many queries are going to share; return whether its model checked it.

    Raises:
        InvalidArgumentError: It does not fit the model.
    """
    for array in (blank.level.a, blank.level.s, blank.labels, blank.windows):
        array.flags.writeable = False
    if entry.loaded is None:
        return False
    entry.loaded.denoiser.check(blank)
    return True
