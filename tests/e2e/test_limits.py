"""Garbage instead of messages, and messages or answers over the limit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.bad_inferences import fp32, infer
from tests.support.bad_requests import denoise, sample, tensor
from tests.support.examples import examples
from tests.support.processes import ServerProcess, serving
from tests.support.refusals import TIMEOUT_S, assert_answers, assert_refused, refused

from els_client import Client
from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceStub
from els_proto.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub

METHODS = [
    *(f"denoise.v1.DenoiserService/{name}" for name in ("Denoise", "Score", "Sample")),
    *(f"denoise.v1.DenoiserService/{name}" for name in ("ListModels", "GetModel")),
    *(f"inference.GRPCInferenceService/Server{name}" for name in ("Live", "Ready", "Metadata")),
    *(f"inference.GRPCInferenceService/Model{name}" for name in ("Ready", "Metadata", "Infer")),
]
GARBAGE = {
    "no message": b"\xff" * 32,
    "truncated": denoise().SerializeToString()[:-3],
    "nested too deep": b"\x0b" * 10_000,
    "length beyond the end": b"\x0a\xff\xff\xff\xff\x0f",
}
LIMIT = 1 << 16


@pytest.fixture(scope="module")
def tight(models: Path) -> Iterator[ServerProcess]:
    """A server whose messages end at 64 KiB."""
    with serving("--models", models, ELS_MAX_MESSAGE_BYTES=str(LIMIT)) as process:
        yield process


@pytest.fixture
def narrow(tight: ServerProcess) -> Iterator[grpc.Channel]:
    """A channel to it."""
    with grpc.insecure_channel(tight.target) as channel:
        yield channel


def raw(channel: grpc.Channel, method: str, data: bytes) -> Any:
    """Ask with bytes for bytes."""
    kind: Any = channel.unary_stream if method.endswith("Sample") else channel.unary_unary
    return kind(f"/{method}", request_serializer=None, response_deserializer=None)(
        data, timeout=TIMEOUT_S
    )


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("method", METHODS)
def test_garbage_instead_of_a_message_is_an_invalid_argument(
    channel: grpc.Channel, method: str, data: bytes
) -> None:
    call = refused(lambda: raw(channel, method, data))
    assert_refused(call, "INVALID_ARGUMENT", "request", "a message of this method", "")
    assert_answers(channel)


@pytest.mark.parametrize("method", [METHODS[0], METHODS[4], METHODS[-1]])
def test_a_name_that_is_no_utf_8_is_an_invalid_argument(channel: grpc.Channel, method: str) -> None:
    call = refused(lambda: raw(channel, method, b"\x0a\x02\xff\xfe"))
    assert_refused(call, "INVALID_ARGUMENT", "request", "a message of this method", "")


def outcome(channel: grpc.Channel, method: str, data: bytes) -> str:
    """Return the name of the status that these bytes are answered with."""
    try:
        answer = raw(channel, method, data)
        if method.endswith("Sample"):
            list(answer)
    except grpc.RpcError as error:
        return str(error.code().name) if isinstance(error, grpc.Call) else repr(error)
    return "OK"


ANSWERS = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED"}


@examples(150)
@given(method=st.sampled_from(METHODS), data=st.binary(max_size=64))
def test_no_bytes_at_all_are_an_error_of_the_server(
    channel: grpc.Channel, method: str, data: bytes
) -> None:
    assert outcome(channel, method, data) in ANSWERS


@examples(150)
@given(place=st.integers(0, 200), flipped=st.integers(1, 255), cut=st.integers(0, 200))
def test_a_message_with_a_damaged_byte_is_answered_or_refused(
    channel: grpc.Channel, place: int, flipped: int, cut: int
) -> None:
    data = bytearray(
        infer(fp32("x", *[0.5] * 30, shape=(1, 1, 6, 5)), fp32("sigma", 1.0)).SerializeToString()
    )
    data[place % len(data)] ^= flipped
    del data[len(data) - cut % 8 :]
    assert outcome(channel, METHODS[-1], bytes(data)) in ANSWERS


def test_a_message_over_64_mib_is_refused(channel: grpc.Channel) -> None:
    request = denoise(x=tensor(shape=(1, 1, 4200, 4000), data=bytes(4200 * 4000 * 4)))
    stub = DenoiserServiceStub(channel)
    call = refused(lambda: stub.Denoise(request, timeout=TIMEOUT_S))
    assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert_answers(channel)


def test_the_limit_is_published_and_a_message_over_it_is_refused(
    tight: ServerProcess, narrow: grpc.Channel
) -> None:
    with Client(tight.target) as client:
        assert client.model("zeros").limits.max_message_bytes == LIMIT
    stub = DenoiserServiceStub(narrow)
    for call in (
        refused(lambda: stub.Denoise(denoise(x=tensor(data=bytes(LIMIT))), timeout=TIMEOUT_S)),
        refused(lambda: stub.Denoise(denoise(model="a" * LIMIT), timeout=TIMEOUT_S)),
    ):
        assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert_answers(narrow)


def test_pixels_over_their_limit_are_refused_and_the_limit_is_published(models: Path) -> None:
    with (
        serving("--models", models, ELS_MAX_PIXELS="6144") as server,
        grpc.insecure_channel(server.target) as few,
    ):
        ours, theirs = DenoiserServiceStub(few), GRPCInferenceServiceStub(few)
        limits = ours.GetModel(pb.GetModelRequest(name="zeros"), timeout=TIMEOUT_S).model.limits
        assert (limits.max_pixels, limits.priority_levels) == (6144, 3)

        def asked(images: int) -> pb.DenoiseRequest:
            shape = (images, 3, 32, 32)
            x = pb.Tensor(dtype=pb.DTYPE_U8, shape=shape, data=bytes(images * 3072))
            return denoise(model="gaussian", x=x)

        def inferred(images: int) -> Any:
            x = fp32("x", *[0.0] * (images * 3072), shape=(images, 3, 32, 32))
            return infer(x, fp32("sigma", 1.0), model="gaussian")

        told = "at most 6144 pixels (B·C·H·W)"
        for call, field in (
            (refused(lambda: ours.Denoise(asked(3), timeout=TIMEOUT_S)), "x.shape"),
            (refused(lambda: theirs.ModelInfer(inferred(3), timeout=TIMEOUT_S)), "x.shape"),
            (
                refused(lambda: ours.Sample(sample(model="gaussian", count=3), timeout=TIMEOUT_S)),
                "count",
            ),
        ):
            assert_refused(call, "RESOURCE_EXHAUSTED", field, told, "9216")
        assert ours.Denoise(asked(2), timeout=TIMEOUT_S).denoised.data
        assert theirs.ModelInfer(inferred(2), timeout=TIMEOUT_S).raw_output_contents
        drawn = sample(model="gaussian", count=2, steps=1)
        assert [step.index for step in ours.Sample(drawn, timeout=TIMEOUT_S)] == [1]


def test_an_answer_over_the_limit_is_refused_before_it_is_computed(narrow: grpc.Channel) -> None:
    images = 16
    bytes_of_x = images * 3 * 32 * 32
    x = pb.Tensor(dtype=pb.DTYPE_U8, shape=[images, 3, 32, 32], data=bytes(bytes_of_x))
    stub = DenoiserServiceStub(narrow)
    request = denoise(model="gaussian", x=x)
    fits = denoise(model="gaussian", x=x, output_dtype=pb.DTYPE_F16)
    drawn = sample(model="gaussian", count=3)
    told = f"a response of at most {LIMIT} bytes"
    for call, field, size in (
        (refused(lambda: stub.Denoise(request, timeout=TIMEOUT_S)), "x.shape", 4 * bytes_of_x),
        (refused(lambda: stub.Denoise(fits, timeout=TIMEOUT_S)), "x.shape", 2 * bytes_of_x),
        (refused(lambda: stub.Sample(drawn, timeout=TIMEOUT_S)), "count", 2 * 3 * 12288),
    ):
        assert_refused(call, "RESOURCE_EXHAUSTED", field, told, f"{size} bytes")
    assert_answers(narrow)


def test_a_response_at_the_limit_is_returned(narrow: grpc.Channel) -> None:
    half = 8 * 3 * 32 * 32
    x = pb.Tensor(dtype=pb.DTYPE_U8, shape=[8, 3, 32, 32], data=bytes(half))
    request = denoise(model="gaussian", x=x, output_dtype=pb.DTYPE_F16)
    answer = DenoiserServiceStub(narrow).Denoise(request, timeout=TIMEOUT_S)
    assert len(answer.denoised.data) == 2 * half
    steps = DenoiserServiceStub(narrow).Sample(
        sample(model="gaussian", count=2, steps=2, return_x=True, return_denoised=True),
        timeout=TIMEOUT_S,
    )
    assert [step.index for step in steps] == [1, 2]


def test_an_inference_whose_answer_is_over_the_limit_is_refused(narrow: grpc.Channel) -> None:
    request = infer(
        fp32("x", *[0.0] * (4 * 3072), shape=(4, 3, 32, 32)), fp32("sigma", 1.0), model="gaussian"
    )
    stub = GRPCInferenceServiceStub(narrow)
    call = refused(lambda: stub.ModelInfer(request, timeout=TIMEOUT_S))
    told = f"a response of at most {LIMIT} bytes"
    assert_refused(call, "RESOURCE_EXHAUSTED", "x.shape", told, f"{2 * 4 * 12288} bytes")
    request.outputs.add(name="score")
    assert len(stub.ModelInfer(request, timeout=TIMEOUT_S).outputs) == 1
