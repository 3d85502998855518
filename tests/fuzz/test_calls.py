"""Every RPC of both services, asked anything: a documented answer, soon, and no harm to others."""

from __future__ import annotations

import contextlib
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor import MethodDescriptor
from hypothesis import given
from hypothesis import strategies as st
from tests.fuzz.good import METHODS, good, pyramids
from tests.fuzz.mutations import near
from tests.fuzz.verdict import MOST_BYTES, ask, full_name, judge, parses
from tests.support.bad_inferences import fp32, infer
from tests.support.examples import examples
from tests.support.models_folder import RGB
from tests.support.processes import ServerProcess

# A failure is told by its own message, not by the size of what failed.
pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")

UNARY = [method for method in METHODS if not method.client_streaming]
SAMPLE = next(method for method in METHODS if method.name == "Sample")
HEAVY = {"Denoise", "Score", "Sample", "ModelInfer"}
EXAMPLES = {True: 120, False: 40}


@pytest.mark.parametrize("method", UNARY, ids=full_name)
def test_any_request_is_answered_as_the_contract_says(
    channel: grpc.Channel, method: MethodDescriptor
) -> None:
    @examples(EXAMPLES[method.name in HEAVY])
    @given(data=near(good(method)))
    def check(data: bytes) -> None:
        outcome = ask(channel, method, data)
        judge(method, data, outcome)
        if len(data) <= MOST_BYTES and not parses(method, data):
            assert outcome.code == "INVALID_ARGUMENT"

    check()


@examples(60)
@given(data=near(pyramids()))
def test_any_request_for_a_picture_is_answered_as_the_contract_says(
    channel: grpc.Channel, data: bytes
) -> None:
    judge(SAMPLE, data, ask(channel, SAMPLE, data))


@examples(10)
@given(request=pyramids())
def test_a_good_request_for_a_picture_is_answered(channel: grpc.Channel, request: Any) -> None:
    data = request.SerializeToString()
    outcome = ask(channel, SAMPLE, data)
    assert outcome.code == "OK", outcome.text
    judge(SAMPLE, data, outcome)


@pytest.mark.parametrize("method", UNARY, ids=full_name)
def test_a_good_request_is_answered(channel: grpc.Channel, method: MethodDescriptor) -> None:
    @examples(10)
    @given(request=good(method))
    def check(request: Any) -> None:
        data = request.SerializeToString()
        judge(method, data, ask(channel, method, data))

    check()


@examples(60)
@given(
    path=st.sampled_from(
        [
            "/grpc.health.v1.Health/Check",
            "/grpc.health.v1.Health/Watch",
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            "/denoise.v1.DenoiserService/Nothing",
            "/nothing",
        ]
    ),
    data=st.binary(max_size=64),
)
def test_garbage_to_services_that_are_not_ours_ends_and_harms_nobody(
    channel: grpc.Channel, path: str, data: bytes
) -> None:
    start: Any = channel.stream_stream(path)
    call = start(iter([data]), timeout=5)
    # A watch of a service has no end: one answer is enough.
    with contextlib.suppress(grpc.RpcError):
        next(call, None)
    call.cancel()


def test_a_message_over_the_limit_is_refused_with_its_size_and_the_limit(
    channel: grpc.Channel,
) -> None:
    method = next(method for method in UNARY if method.name == "ModelInfer")
    data = bytes(MOST_BYTES + 1)
    judge(method, data, ask(channel, method, data))


def test_an_id_that_makes_the_answer_too_large_is_refused_in_our_words(
    server: ServerProcess,
) -> None:
    x = np.zeros((8, *RGB), "<f4")
    request = infer(("x", "FP32", x.shape, x.tobytes()), fp32("sigma", 1.0), model="gaussian")
    request.id = "a" * (MOST_BYTES - x.nbytes - 1000)
    method = next(method for method in UNARY if method.name == "ModelInfer")
    with grpc.insecure_channel(server.target, [("grpc.max_send_message_length", -1)]) as wide:
        data = request.SerializeToString()
        outcome = ask(wide, method, data)
    assert outcome.code == "RESOURCE_EXHAUSTED"
    judge(method, data, outcome)
