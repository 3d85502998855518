"""What requests say beside their pixels, kept: callers send image after image alike.

Reading a message field by field costs more than the arithmetic of a small model. An envelope is the
request without its pixels, and good for every image that comes in the same bytes. From its second
request on it is known by those bytes, and its answers are written around their pixels (``frames``).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from els_service.denoisers.base import DenoiserInfo, Query
from els_service.engine.registry import ModelRegistry, ModelVersion
from els_service.errors import ElsError
from els_service.server.requests.frames import Frame, Frames, frame_of

KEY_BYTES = 512
"""Envelopes that are longer are not kept."""
_KEPT = 4096


@dataclass(eq=False, slots=True)
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
    known: bool = field(default=False, init=False)
    """Whether a second request came in it."""
    frame: Frame | None = field(default=None, init=False)
    """Of its answers, from then on; None where they are more than pixels."""

    def ask(self, pixels: npt.NDArray[np.float32]) -> Query:
        """Return the query of pixels [B, C, H, W] that were found good."""
        blank = self.blank
        return Query(pixels, blank.level, blank.labels, blank.windows, blank.conditions)


_E = TypeVar("_E", bound=Envelope)


class Recognised(Generic[_E]):
    """Stands for a request whose envelope is known."""

    __slots__ = ("entry", "envelope", "pixels")

    def __init__(self, entry: ModelVersion, envelope: _E, pixels: memoryview) -> None:
        self.entry, self.envelope, self.pixels = entry, envelope, pixels

    @property
    def model(self) -> str:
        """The model's name, as the field of a request."""
        return self.envelope.model

    model_name = model

    def open(self) -> tuple[ModelVersion, _E, memoryview]:
        """Return model, envelope and pixels; takes the pixels out."""
        pixels, self.pixels = self.pixels, memoryview(b"")
        return self.entry, self.envelope, pixels


class Kept(Generic[_E]):
    """The envelopes seen lately, by their bytes."""

    def __init__(self, models: ModelRegistry) -> None:
        self._models, self._kept = models, dict[Hashable, _E]()
        self._frames: Frames[_E] = Frames()

    def get(self, key: Hashable) -> tuple[ModelVersion, _E] | None:
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

    def learn(self, envelope: _E, asks: Callable[[bytes], bytes], size: int) -> None:
        """Recognise requests in an envelope from now on.

        Args:
            envelope: of a second request; few have one, so not of the first.
            asks: returns the bytes of the request with other pixels.
            size: bytes of pixels.
        """
        envelope.known = True
        if (frame := frame_of(asks, size)) is not None:
            self._frames.put(frame, size, envelope)

    def recognise(self, data: bytes) -> Recognised[_E] | None:
        """Return the request that bytes are, if it came in a known envelope and is as good now."""
        found = self._frames.find(data)
        if found is None:
            return None
        envelope, pixels = found
        try:
            entry = self._models.entry(envelope.model, envelope.version)
        except ElsError:
            return None  # whoever reads the whole of it will say so
        return Recognised(entry, envelope, pixels) if entry.info is envelope.info else None
