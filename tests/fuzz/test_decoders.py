"""No bytes at all bring a decoder down: it raises an error of ours, or what it returns is sound."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.fuzz.decoders import INFO, LIMITS, TARGETS, seeds
from tests.fuzz.mutations import damage
from tests.support.bad_requests import denoise
from tests.support.examples import examples
from tests.support.opened import open_denoise

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_service.errors import InvalidArgumentError

SLOW = {"weights", "network", "statistics"}
FOUND: dict[str, list[bytes]] = {}
"""Bytes that once did, by target."""


@st.composite
def damaged(draw: st.DrawFn, target: str) -> bytes:
    """Draw good bytes with up to four places damaged."""
    data = draw(st.sampled_from(seeds()[target]))
    for _ in range(draw(st.integers(0, 4))):
        data = damage(draw, data)
    return data


@pytest.mark.parametrize("target", TARGETS)
def test_damaged_bytes_are_refused_or_sound(target: str) -> None:
    count = 20 if target in SLOW else 100

    @examples(count)
    @given(data=damaged(target))
    @example(data=b"")
    @example(data=b"\xff" * 64)
    def check(data: bytes) -> None:
        TARGETS[target](data)

    for data in [*seeds()[target], *FOUND.get(target, [])]:
        TARGETS[target](data)
    check()


@pytest.mark.parametrize("field", ["labels", "windows"])
def test_lists_of_millions_are_refused_by_their_length(field: str) -> None:
    request: Any = denoise()
    getattr(request, field).extend([1] * 2_000_000)
    with pytest.raises(InvalidArgumentError, match="at most one for each of 8 images, got 2000000"):
        open_denoise(request, INFO, LIMITS)


def test_a_level_of_millions_is_refused_by_its_length() -> None:
    request = denoise(level=pb.NoiseLevel(time=[0.5] * 2_000_000))
    with pytest.raises(InvalidArgumentError, match="at most one for each of 8 images, got 2000000"):
        open_denoise(request, INFO, LIMITS)
