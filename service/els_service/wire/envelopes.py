"""What requests say beside their pixels, judged once: callers send image after image alike.

Reading a message field by field costs more than the arithmetic of a small model. An envelope is the
request without its pixels, and good for every image that comes in the same bytes.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.config import Limits
from els_service.denoisers.base import DenoiserInfo, Query, make_query
from els_service.engine.models import Entry, Models
from els_service.errors import InvalidArgumentError
from els_service.wire import codec

KEY_BYTES = 512
"""Envelopes that are longer are not kept."""
_KEPT = 4096


@dataclass(eq=False, slots=True)  # never changed
class Envelope:
    """A request without its pixels, found good."""

    info: DenoiserInfo
    """Of the model that judged the request; not the model, which would stay in memory."""
    checked: bool
    """Whether its denoiser can answer; else the engine is to see to it."""
    model: str
    version: str
    """As asked for: empty for the newest."""
    blank: Query
    """The query but for its pixels, which are zero; read-only, as many queries share it."""
    priority: int
    timeout_s: float

    def ask(self, pixels: npt.NDArray[np.float32]) -> Query:
        """Return the query of pixels [B, C, H, W] that were found good."""
        blank = self.blank
        return Query(pixels, blank.level, blank.labels, blank.windows, blank.conditions)


@dataclass(eq=False, slots=True)  # never changed
class DenoiseEnvelope(Envelope):
    """A ``DenoiseRequest`` or ``ScoreRequest`` without its pixels."""

    dtype: int
    """In which its pixels come."""
    head: bytes
    """The tensor of its answer, but for the data."""
    output_dtype: pb.DType.ValueType
    log_evidence: bool
    """Whether it is wanted."""

    def query(self, data: bytes) -> Query:
        """Return the query of the pixels in ``data``.

        Raises:
            InvalidArgumentError: The byte count or a pixel is wrong.
        """
        return self.ask(codec.decode_pixels(data, self.dtype, "x", self.blank.pixels.shape))

    def write(self, message: pb.Tensor, answer: Tensor | npt.NDArray[np.float32]) -> None:
        """Fill an empty message with the images [B, C, H, W] that answer the request."""
        # Parsing what is always the same takes half the time of writing it.
        message.MergeFromString(self.head)
        message.data = codec.bytes_of(answer, self.output_dtype)


_E = TypeVar("_E", bound=Envelope)


class Kept(Generic[_E]):
    """The envelopes seen lately, by their bytes."""

    def __init__(self, models: Models) -> None:
        self._models, self._kept = models, dict[Hashable, _E]()

    def get(self, key: Hashable) -> tuple[Entry, _E] | None:
        """Return the model and the envelope of a key, unless the model is another by now.

        Raises:
            NotFoundError, UnavailableError: The model is not served.
        """
        known = self._kept.get(key)
        if known is None:
            return None
        entry = self._models.entry(known.model, known.version)
        return (entry, known) if entry.info is known.info else None

    def put(self, key: Hashable, envelope: _E) -> None:
        """Keep an envelope; callers make keys as they please, so there is a bound."""
        if len(self._kept) >= _KEPT:
            self._kept.clear()
        self._kept[key] = envelope


class Envelopes:
    """Opens the requests of one method."""

    def __init__(self, models: Models, limits: Limits) -> None:
        self._models, self._limits = models, limits
        self._kept: Kept[DenoiseEnvelope] = Kept(models)

    def open(self, request: codec.Request) -> tuple[Entry, DenoiseEnvelope, Query]:
        """Return a request's model, envelope and query; takes the pixels out of the request.

        Raises:
            NotFoundError, UnavailableError: No such model.
            InvalidArgumentError, ResourceExhaustedError: As ``seal`` and ``DenoiseEnvelope.query``.
        """
        data = request.x.data
        request.x.ClearField("data")
        # A condition is as large as an image.
        key = b"" if request.HasField("conditioning") else request.SerializeToString()
        kept = self._kept.get(key)
        if kept is not None:
            entry, envelope = kept
        else:
            entry = self._models.entry(request.model, request.version)
            envelope = seal(request, len(data), entry, self._limits)
            if 0 < len(key) <= KEY_BYTES:
                self._kept.put(key, envelope)
        return entry, envelope, envelope.query(data)


def seal(request: codec.Request, size: int, entry: Entry, limits: Limits) -> DenoiseEnvelope:
    """Return the envelope of a request with ``size`` bytes of pixels to a model.

    Raises:
        InvalidArgumentError: A field is wrong, or evidence is asked of a model without.
        ResourceExhaustedError: Too many images or pixels, or the answer would exceed the limit.
    """
    info = entry.info
    shape = codec.decode_shape(request.x, size, "x", limits)
    if request.return_log_evidence and not info.has_log_evidence:
        raise InvalidArgumentError("return_log_evidence", "false for this model", "true")
    answer = codec.answer_size(shape, request.output_dtype, request.return_log_evidence)
    codec.check_answer_size("x.shape", answer, limits)
    blank = make_query(
        np.broadcast_to(np.float32(0), shape),
        codec.decode_level(request.level, info.levels, limits),
        codec.few("labels", request.labels, limits),
        codec.decode_windows(codec.few("windows", request.windows, limits)),
        codec.decode_conditions(request, info, shape[0]),
    )
    head = pb.Tensor(dtype=request.output_dtype or pb.DTYPE_F32, shape=shape)
    return DenoiseEnvelope(
        info,
        share(blank, entry),
        request.model,
        request.version,
        blank,
        request.priority,
        request.timeout_s,
        request.x.dtype,
        head.SerializeToString(),
        request.output_dtype,
        request.return_log_evidence,
    )


def share(blank: Query, entry: Entry) -> bool:
    """Make read-only what many queries are going to share; return whether its model checked it.

    Raises:
        InvalidArgumentError: It does not fit the model.
    """
    for array in (blank.level.a, blank.level.s, blank.labels, blank.windows):
        array.flags.writeable = False
    if entry.lane is None:
        return False
    entry.lane.denoiser.check(blank)
    return True
