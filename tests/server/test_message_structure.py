from __future__ import annotations

import gzip
import time
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.bad_inferences import fp32, infer
from tests.support.bad_requests import denoise, tensor
from tests.support.messages import large

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.inference import grpc_service_pb2 as oip
from els_service.server.requests.message_structure import (
    SMALL_BYTES,
    MessageStructureError,
    check_gzip_head,
    check_structure,
    field_of,
    inflated,
)

IMAGES = 256
PIXELS = np.zeros(1 << 18, "<f4").tobytes()


def test_pixels_are_no_structure_however_many_they_are() -> None:
    request = denoise(x=tensor(shape=(64, 1, 64, 64), data=PIXELS), labels=[3] * IMAGES)
    request.level.sigma[:] = [0.5] * IMAGES
    check_structure(request.SerializeToString(), pb.DenoiseRequest.DESCRIPTOR, IMAGES)
    inference = infer(fp32("x", *[0.5] * (1 << 15), shape=(8, 1, 64, 64)), fp32("sigma", 1.0))
    check_structure(inference.SerializeToString(), oip.ModelInferRequest.DESCRIPTOR, IMAGES)
    raw = oip.ModelInferRequest(model_name="m", raw_input_contents=[PIXELS, PIXELS])
    check_structure(raw.SerializeToString(), oip.ModelInferRequest.DESCRIPTOR, IMAGES)


BOMBS = {
    "a shape of a million numbers": large(2, large(2, b"\1" * (1 << 20))),
    "a million labels": large(4, b"\1" * (1 << 20)),
    "labels one by one": b"\x20\1" * (1 << 19),
    "empty sub-messages": b"\x1a\0" * (1 << 19),
    "a field that nobody knows": large(15, b"a" * (1 << 20)),
    "a group": b"\x0b" * (1 << 20),
    "beyond the end": b"\x12\xff\xff\xff\x7f" + bytes(1 << 17),
    "a number without an end": b"\xff" * (1 << 17),
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_structure_is_rejected_before_it_is_parsed(data: bytes) -> None:
    began = time.process_time()
    with pytest.raises(MessageStructureError):
        check_structure(data, pb.DenoiseRequest.DESCRIPTOR, IMAGES)
    assert time.process_time() - began < 0.5


def test_inputs_and_parameters_of_an_inference_are_structure() -> None:
    tensor_of = oip.ModelInferRequest.InferInputTensor
    many = oip.ModelInferRequest(inputs=[tensor_of() for _ in range(1 << 16)])
    contents = oip.InferTensorContents(int64_contents=[1] * (1 << 17))
    numbers = oip.ModelInferRequest(inputs=[tensor_of(contents=contents)])
    for message in (many, numbers):
        with pytest.raises(MessageStructureError):
            check_structure(message.SerializeToString(), message.DESCRIPTOR, IMAGES)


def test_more_images_allow_for_more_labels() -> None:
    data = pb.DenoiseRequest(labels=[1] * 100_000).SerializeToString()
    with pytest.raises(MessageStructureError):
        check_structure(data, pb.DenoiseRequest.DESCRIPTOR, IMAGES)
    check_structure(data, pb.DenoiseRequest.DESCRIPTOR, 100_000)


@given(data=st.binary(max_size=300), seed=st.integers(0, 255))
def test_any_bytes_are_checked_or_rejected(data: bytes, seed: int) -> None:
    try:
        check_structure(
            data * (1 + SMALL_BYTES // max(1, len(data))),
            oip.DESCRIPTOR.message_types_by_name["ModelInferRequest"],
            seed,
        )
    except MessageStructureError:
        return


def test_gzip_is_decompressed_as_far_as_the_limit() -> None:
    assert inflated(b"\x0a\1a", 10) == b"\x0a\1a"
    assert inflated(gzip.compress(PIXELS), len(PIXELS)) == PIXELS
    with pytest.raises(MessageStructureError, match="more than 1048575 bytes"):
        inflated(gzip.compress(PIXELS), len(PIXELS) - 1)


@pytest.mark.parametrize("data", [gzip.compress(PIXELS)[:-9], b"\x1f\x8b", b"\x1f\x8b" + bytes(50)])
def test_gzip_that_is_broken_is_rejected(data: bytes) -> None:
    with pytest.raises(MessageStructureError):
        inflated(data, len(PIXELS))


@pytest.mark.slow
def test_a_bomb_costs_no_more_memory_than_the_limit() -> None:
    packer = zlib.compressobj(wbits=31)
    bomb = b"".join(packer.compress(bytes(1 << 24)) for _ in range(16)) + packer.flush()
    with pytest.raises(MessageStructureError):
        inflated(bomb, 1 << 20)


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_structure_is_rejected_before_it_is_decompressed(data: bytes) -> None:
    bomb = gzip.compress(data * 32)
    began = time.process_time()
    with pytest.raises(MessageStructureError):
        check_gzip_head(bomb, pb.DenoiseRequest.DESCRIPTOR, IMAGES, 1 << 26)
    assert time.process_time() - began < 0.2


def test_pixels_longer_than_the_head_of_gzip_pass_it() -> None:
    message = denoise(x=tensor(shape=(64, 1, 64, 64), data=PIXELS)).SerializeToString()
    check_gzip_head(gzip.compress(message), pb.DenoiseRequest.DESCRIPTOR, IMAGES, 1 << 26)
    with pytest.raises(MessageStructureError, match="more than 1024 bytes"):
        check_gzip_head(gzip.compress(message), pb.DenoiseRequest.DESCRIPTOR, IMAGES, 1024)


def test_the_last_field_of_a_number_is_found_among_pixels() -> None:
    first = denoise(x=tensor(shape=(64, 1, 64, 64), data=PIXELS)).SerializeToString()
    last = pb.DenoiseRequest(model="later", version="3", labels=[1]).SerializeToString()
    number = pb.DenoiseRequest.DESCRIPTOR.fields_by_name["model"].number
    found = field_of(first + last, number)
    assert pb.DenoiseRequest.FromString(found) == pb.DenoiseRequest(model="later")
    assert field_of(pb.DenoiseRequest(version="3").SerializeToString(), number) == b""
