"""Parsing of requests: what is left out, and what is rejected before it is decompressed."""

from __future__ import annotations

import asyncio
import gzip

import pytest
from tests.support.bad_requests import denoise, tensor
from tests.support.messages import large

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.inference import grpc_service_pb2 as oip
from els_service.config import Limits
from els_service.engine.budget import Budget
from els_service.errors import InvalidArgumentError, ResourceExhaustedError
from els_service.server.telemetry.metrics import Method
from els_service.server.transport.message_memory import MessageMemory
from els_service.server.transport.receiving import (
    Decompressor,
    Malformed,
    Parse,
    check_message,
    parser,
)

MIB = 1 << 20
PIXELS = bytes(MIB)
LIMITS = Limits(max_images=256, max_steps=100, max_message_bytes=64 * MIB, max_pixels=1 << 20)


def parse_of(request: type[pb.DenoiseRequest] | type[oip.ModelInferRequest], field: str) -> Parse:
    method = Method("unary", "service", "method", field)
    return parser(request.FromString, method, LIMITS, {"served"}.__contains__)


@pytest.mark.parametrize("name", ["served", "unknown"])
def test_a_large_request_for_an_unknown_model_is_parsed_without_its_pixels(name: str) -> None:
    request = denoise(model=name, x=tensor(shape=(64, 1, 64, 64), data=PIXELS))
    parsed = parse_of(pb.DenoiseRequest, "model")(request.SerializeToString())
    assert parsed == (request if name == "served" else pb.DenoiseRequest(model=name))
    inference = oip.ModelInferRequest(model_name=name, raw_input_contents=[PIXELS])
    parsed = parse_of(oip.ModelInferRequest, "model_name")(inference.SerializeToString())
    assert parsed == (inference if name == "served" else oip.ModelInferRequest(model_name=name))


def test_a_large_request_without_bulk_data_keeps_all_its_fields() -> None:
    request = oip.RepositoryModelLoadRequest(model_name="unknown")
    request.parameters["config"].string_param = "a" * MIB
    method = Method("unary", "service", "method", "model_name")
    parse = parser(request.FromString, method, LIMITS, {"served"}.__contains__)
    assert parse(request.SerializeToString()) == request


def test_a_gzip_bomb_is_beyond_a_limit_and_other_gzip_malformed() -> None:
    parse = parse_of(pb.DenoiseRequest, "model")
    decompress = Decompressor(MessageMemory(Budget(1.0)), pb.DenoiseRequest.FromString, LIMITS)
    bomb = gzip.compress(bytes(LIMITS.max_message_bytes + 1))
    for found in (parse(bomb), asyncio.run(decompress("caller", bomb))):
        with pytest.raises(ResourceExhaustedError, match=r"request: expected at most .* got"):
            check_message(found)
    with pytest.raises(InvalidArgumentError, match="its end announces"):
        check_message(parse(gzip.compress(b"")[:-9]))


def test_compressed_structure_is_not_decompressed() -> None:
    memory = MessageMemory(Budget(1024.0))  # any decompression would be rejected
    decompress = Decompressor(memory, pb.DenoiseRequest.FromString, LIMITS)
    bomb = gzip.compress(large(2, large(2, b"\1" * (32 * MIB))))
    found = asyncio.run(decompress("caller", bomb))
    assert isinstance(found, Malformed)
    assert "beside its bulk data" in found.reason
    assert parse_of(pb.DenoiseRequest, "model")(found) is found
