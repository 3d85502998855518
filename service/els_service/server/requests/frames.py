"""Messages recognised by their bytes: what stands around the pixels is read once, not at each call.

Callers send image after image with the same words around it. A frame is those words: what comes
before the pixels and what comes after. As the words before say how many bytes of pixels follow, any
message of the same length with the same frame says the same of other pixels. Nothing here knows how
messages are written: where the pixels are is found by search, and proven by a message that has
other pixels there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

V = TypeVar("V")

_LARGEST = 1 << 20
"""Bytes of pixels; of more, reading what stands around them is the least."""
_KEPT = 4096
"""Frames; callers make as many as they please."""


@dataclass(frozen=True, slots=True)
class Frame:
    """The bytes around the pixels of a message."""

    head: bytes
    tail: bytes

    def around(self, pixels: bytes) -> bytes:
        """Return the message with these pixels, as many as it was made for."""
        return b"".join((self.head, pixels, self.tail))


def frame_of(write: Callable[[bytes], bytes], size: int) -> Frame | None:
    """Return the frame of messages that differ in ``size`` bytes alone; None if they have none.

    Args:
        write: returns the message with these bytes in it.
        size: of them.
    """
    if not 0 < size <= _LARGEST:
        return None
    ones, others = b"\x5a" * size, b"\xa5" * size
    message = write(ones)
    start = message.find(ones)
    frame = Frame(message[:start], message[start + size :])
    # Were the bytes to stand elsewhere too, or not at all, others would make another message.
    return frame if start >= 0 and frame.around(others) == write(others) else None


class Frames(Generic[V]):
    """What is known of messages, by their frames."""

    def __init__(self) -> None:
        self._places: dict[int, tuple[int, int, dict[bytes, V]]] = {}
        """Length of a message → where its pixels begin and end, and what is known by the rest."""
        self._count = 0

    def find(self, message: bytes) -> tuple[V, memoryview] | None:
        """Return what is known of a message by its frame, and its pixels, which it holds on to."""
        place = self._places.get(len(message))
        if place is None:
            return None
        start, end, known = place
        value = known.get(message[:start] + message[end:])
        return None if value is None else (value, memoryview(message)[start:end])

    def put(self, frame: Frame, size: int, value: V) -> None:
        """Keep what is known of messages of a frame with ``size`` bytes of pixels."""
        if self._count >= _KEPT:
            self._places.clear()
            self._count = 0
        start = len(frame.head)
        end = start + size
        length = end + len(frame.tail)
        place = self._places.get(length)
        if place is None or place[:2] != (start, end):
            # With pixels in another place the same bytes around them are another frame.
            place = self._places[length] = (start, end, {})
        place[2][frame.head + frame.tail] = value
        self._count += 1
