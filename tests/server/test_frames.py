"""A message is known by what stands around its pixels, and by nothing less."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from els_service.server.requests import frames
from els_service.server.requests.frames import Frame, Frames, frame_of

V = TypeVar("V")


@given(head=st.binary(max_size=20), tail=st.binary(max_size=20), size=st.integers(1, 40))
def test_a_frame_is_what_does_not_change_with_the_pixels(
    head: bytes, tail: bytes, size: int
) -> None:
    frame = frame_of(lambda pixels: head + pixels + tail, size)
    # Where the words end like the pixels begin there may be none, but never a wrong one.
    if frame is not None:
        assert frame.around(b"x" * size) == head + b"x" * size + tail
    elif b"\x5a" not in head:
        pytest.fail("expected a frame")


@pytest.mark.parametrize(
    "write",
    [
        lambda pixels: pixels + b"|" + pixels,
        lambda pixels: pixels[::2],
        lambda pixels: bytes(255 - byte for byte in pixels),
        lambda pixels: b"nothing",
    ],
)
def test_messages_that_are_not_words_around_pixels_have_none(
    write: Callable[[bytes], bytes],
) -> None:
    assert frame_of(write, 4) is None


def test_without_pixels_or_with_very_many_there_is_none() -> None:
    assert frame_of(lambda pixels: b"a" + pixels, 0) is None
    assert frame_of(lambda pixels: b"a" + pixels, frames._LARGEST + 1) is None


def found(known: Frames[V], message: bytes) -> tuple[V, bytes] | None:
    value = known.find(message)
    return None if value is None else (value[0], bytes(value[1]))


def test_only_a_message_of_the_same_length_and_words_is_found() -> None:
    known: Frames[str] = Frames()
    known.put(Frame(b"head", b"tail"), 3, "this one")
    assert found(known, b"headxyztail") == ("this one", b"xyz")
    for other in (b"headwxyztail", b"headxytail", b"heaDxyztail", b"headxyztaiL", b"", b"xyz"):
        assert known.find(other) is None


def test_the_same_words_around_another_place_are_another_frame() -> None:
    known: Frames[str] = Frames()
    known.put(Frame(b"ab", b"c"), 2, "first")
    known.put(Frame(b"a", b"bc"), 2, "second")
    assert found(known, b"axybc") == ("second", b"xy")
    assert known.find(b"abxyc") is None


def test_what_is_known_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "_KEPT", 3)
    known: Frames[int] = Frames()
    for number in range(10):
        known.put(Frame(bytes([number]), b""), 1, number)
        assert found(known, bytes([number, 7])) == (number, b"\x07")
    assert sum(known.find(bytes([number, 7])) is not None for number in range(10)) <= 3
