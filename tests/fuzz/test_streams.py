"""Streams and crowds of any requests: each its own answer, in order, however callers behave.

The server has memory for one model, so that most requests meet one that is being loaded.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.rpc import status_pb2
from hypothesis import given
from hypothesis import strategies as st
from tests.fuzz.good import METHODS, good
from tests.fuzz.mutations import near
from tests.fuzz.verdict import (
    BOUND_S,
    CODES,
    MOST_BYTES,
    begin,
    finish,
    full_name,
    judge,
    judge_answers,
    judge_refusal,
)
from tests.support.examples import examples

from els_proto.denoise.v1 import denoise_pb2 as pb

(METHOD,) = (method for method in METHODS if method.client_streaming)
UNARY = [method for method in METHODS if not method.client_streaming]
ENVIRONMENT = {"ELS_MEMORY_BYTES": "1"}
# One that is too large ends its stream: gRPC does not know whose answer it would be.
REQUEST = near(good(METHOD)).filter(lambda data: len(data) <= MOST_BYTES)
REQUESTS = st.lists(st.one_of(REQUEST, st.binary(max_size=30)), max_size=12)

pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")


def stream(channel: grpc.Channel, requests: Iterator[bytes]) -> Any:
    """Start a stream of serialised requests."""
    parse = pb.DenoiseStreamResponse.FromString
    start: Any = channel.stream_stream(full_name(METHOD), response_deserializer=parse)
    return start(requests, timeout=BOUND_S)


def judge_answer(data: bytes, answer: pb.DenoiseStreamResponse) -> None:
    """Check the answer to one request of a stream."""
    if answer.WhichOneof("result") == "response":
        judge_answers(pb.DenoiseRequest.FromString(data), [answer.response])
        return
    error: status_pb2.Status = answer.error
    judge_refusal(error, error.message)
    assert grpc_name(error.code) in CODES - {"OK"}


def grpc_name(number: int) -> str:
    """Return the name of a status by its number."""
    return next(code.name for code in grpc.StatusCode if code.value[0] == number)


@examples(150)
@given(requests=REQUESTS)
def test_each_request_of_a_stream_has_its_answer_in_order(
    channel: grpc.Channel, requests: list[bytes]
) -> None:
    since = time.monotonic()
    answers = list(stream(channel, iter(requests)))
    assert time.monotonic() - since < BOUND_S / 2
    for data, answer in zip(requests, answers, strict=True):
        judge_answer(data, answer)


@examples(100)
@given(requests=REQUESTS, taken=st.integers(0, 12), hangs_up=st.booleans())
def test_a_stream_that_is_left_early_was_right_so_far(
    channel: grpc.Channel, requests: list[bytes], taken: int, hangs_up: bool
) -> None:
    call = stream(channel, iter(requests))
    for data, answer in zip(requests[:taken], call, strict=False):
        judge_answer(data, answer)
    if hangs_up:
        call.cancel()
    with contextlib.suppress(grpc.RpcError):
        list(call)


@examples(60)
@given(requests=REQUESTS)
def test_a_conversation_is_answered_turn_by_turn(
    channel: grpc.Channel, requests: list[bytes]
) -> None:
    said: SimpleQueue[bytes | None] = SimpleQueue()
    call = stream(channel, iter(said.get, None))
    for data in requests:
        said.put(data)
        judge_answer(data, next(call))
    said.put(None)
    assert list(call) == []


@st.composite
def crowds(draw: st.DrawFn) -> list[tuple[MethodDescriptor, bytes, bool]]:
    """Draw calls to make at once, and which of them to give up."""
    methods = draw(st.lists(st.sampled_from(UNARY), min_size=2, max_size=12))
    return [(method, draw(near(good(method))), draw(st.booleans())) for method in methods]


@examples(40)
@given(crowd=crowds())
def test_a_crowd_of_any_requests_is_answered_and_who_leaves_harms_nobody(
    channel: grpc.Channel, crowd: list[tuple[MethodDescriptor, bytes, bool]]
) -> None:
    since = time.monotonic()
    calls = [begin(channel, method, data) for method, data, _ in crowd]
    for call, (_, _, leaves) in zip(calls, crowd, strict=True):
        if leaves:
            call.cancel()
    for call, (method, data, leaves) in zip(calls, crowd, strict=True):
        outcome = finish(call, method, since)
        if not leaves:
            judge(method, data, outcome)
