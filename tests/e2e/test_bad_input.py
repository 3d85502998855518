"""Bad requests of our own contract: a clear status that names the field, and the server goes on."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from tests.support.bad_requests import QUERIES, SAMPLES, Bad, denoise, sample
from tests.support.processes import ServerProcess
from tests.support.refusals import TIMEOUT_S, assert_answers, assert_refused, refused

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceStub


@pytest.fixture
def stub(channel: grpc.Channel) -> DenoiserServiceStub:
    return DenoiserServiceStub(channel)


@pytest.mark.parametrize("bad", QUERIES.values(), ids=QUERIES)
def test_a_bad_query_is_refused_with_field_expected_and_got(
    stub: DenoiserServiceStub, channel: grpc.Channel, bad: Bad
) -> None:
    request, *expected = bad
    denoising = pb.DenoiseRequest.FromString(request.SerializeToString())
    scoring = pb.ScoreRequest.FromString(request.SerializeToString())
    for call in (
        refused(lambda: stub.Denoise(denoising, timeout=TIMEOUT_S)),
        refused(lambda: stub.Score(scoring, timeout=TIMEOUT_S)),
    ):
        field, text, got, code = expected
        assert_refused(call, code, field, text[:150], got)
    assert_answers(channel)


@pytest.mark.parametrize("bad", SAMPLES.values(), ids=SAMPLES)
def test_a_bad_sample_is_refused_with_field_expected_and_got(
    stub: DenoiserServiceStub, channel: grpc.Channel, bad: Bad
) -> None:
    request, field, text, got, code = bad
    assert isinstance(request, pb.SampleRequest)
    call = refused(lambda: stub.Sample(request, timeout=TIMEOUT_S))
    assert_refused(call, code, field, text, got)
    assert_answers(channel)


@pytest.mark.parametrize("name", ["", "nobody", "zeros ", "ZEROS", "../zeros", "é" * 10_000])
def test_an_unknown_model_is_not_found_and_the_text_names_those_there_are(
    stub: DenoiserServiceStub, channel: grpc.Channel, name: str
) -> None:
    for call in (
        refused(lambda: stub.Denoise(denoise(model=name), timeout=TIMEOUT_S)),
        refused(lambda: stub.Score(pb.ScoreRequest(model=name), timeout=TIMEOUT_S)),
        refused(lambda: stub.Sample(sample(model=name), timeout=TIMEOUT_S)),
        refused(lambda: stub.GetModel(pb.GetModelRequest(name=name), timeout=TIMEOUT_S)),
    ):
        assert call.code() is grpc.StatusCode.NOT_FOUND
        assert "equivariant, gaussian, ideal" in (call.details() or "")
        assert f"got {name[:20]!r}"[:-1] in (call.details() or "")
    assert_answers(channel)


def test_an_unknown_method_is_unimplemented(channel: grpc.Channel) -> None:
    ask: Any = channel.unary_unary("/denoise.v1.DenoiserService/Explode")
    call = refused(lambda: ask(b"", timeout=TIMEOUT_S))
    assert call.code() is grpc.StatusCode.UNIMPLEMENTED
    assert_answers(channel)


def test_nothing_of_this_was_an_error_of_the_server(
    server: ServerProcess, stub: DenoiserServiceStub
) -> None:
    refused(lambda: stub.Denoise(denoise(labels=[3]), timeout=TIMEOUT_S))
    records = server.records()
    assert any(record.get("code") == "INVALID_ARGUMENT" for record in records)
    assert [record for record in records if record["level"] in ("warning", "error")] == []
