"""The Open Inference Protocol, asked with our own stubs: typed contents, and what is refused."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest
from tests.support.bad_inferences import INFERENCES, ONE, SIGMA, X, fp32, infer, int64, typed
from tests.support.bad_requests import Bad
from tests.support.refusals import TIMEOUT_S, assert_answers, assert_refused, refused

from els_client import Client
from els_proto.inference import grpc_service_pb2 as pb
from els_proto.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from els_service.version import COMMIT, VERSION

PIXELS = np.random.default_rng(5).normal(size=(2, *ONE[1:])).astype(np.float32)


@pytest.fixture
def stub(channel: grpc.Channel) -> GRPCInferenceServiceStub:
    return GRPCInferenceServiceStub(channel)


def decoded(response: pb.ModelInferResponse) -> dict[str, np.ndarray]:
    return {
        output.name: np.frombuffer(raw, "<f4").reshape(tuple(output.shape))
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }


@pytest.mark.parametrize("bad", INFERENCES.values(), ids=INFERENCES)
def test_a_bad_inference_is_refused_with_field_expected_and_got(
    stub: GRPCInferenceServiceStub, channel: grpc.Channel, bad: Bad
) -> None:
    request, field, text, got, code = bad
    assert isinstance(request, pb.ModelInferRequest)
    call = refused(lambda: stub.ModelInfer(request, timeout=TIMEOUT_S))
    assert_refused(call, code, field, text[:150], got)
    assert_answers(channel)


def test_an_unknown_model_or_version_is_not_found(stub: GRPCInferenceServiceStub) -> None:
    for call in (
        refused(lambda: stub.ModelInfer(infer(X, SIGMA, model="nobody"), timeout=TIMEOUT_S)),
        refused(lambda: stub.ModelInfer(infer(X, SIGMA, version="2"), timeout=TIMEOUT_S)),
        refused(lambda: stub.ModelMetadata(pb.ModelMetadataRequest(name="a"), timeout=TIMEOUT_S)),
        refused(
            lambda: stub.ModelMetadata(
                pb.ModelMetadataRequest(name="zeros", version="7"), timeout=TIMEOUT_S
            )
        ),
    ):
        assert call.code() is grpc.StatusCode.NOT_FOUND


def test_the_server_is_live_and_ready_and_returns_version_and_commit(
    stub: GRPCInferenceServiceStub,
) -> None:
    assert stub.ServerLive(pb.ServerLiveRequest(), timeout=TIMEOUT_S).live
    assert stub.ServerReady(pb.ServerReadyRequest(), timeout=TIMEOUT_S).ready
    metadata = stub.ServerMetadata(pb.ServerMetadataRequest(), timeout=TIMEOUT_S)
    assert (metadata.name, metadata.version) == ("els-denoise", f"{VERSION}+{COMMIT}")


@pytest.mark.parametrize(
    ("name", "version", "ready"),
    [("zeros", "", True), ("zeros", "1", True), ("zeros", "2", False), ("nobody", "", False)],
)
def test_a_model_is_ready_if_it_is_served_in_that_version(
    stub: GRPCInferenceServiceStub, name: str, version: str, ready: bool
) -> None:
    request = pb.ModelReadyRequest(name=name, version=version)
    assert stub.ModelReady(request, timeout=TIMEOUT_S).ready is ready


@pytest.mark.parametrize(
    ("model", "inputs", "outputs"),
    [
        ("zeros", "x sigma alpha_bar time label window", "denoised score log_evidence"),
        ("ideal", "x sigma alpha_bar time label", "denoised score log_evidence"),
        ("wiener", "x sigma alpha_bar time label", "denoised score"),
        ("gaussian", "x sigma alpha_bar time", "denoised score"),
    ],
)
def test_the_metadata_lists_the_inputs_and_outputs_that_a_model_has(
    stub: GRPCInferenceServiceStub, model: str, inputs: str, outputs: str
) -> None:
    metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name=model), timeout=TIMEOUT_S)
    assert (metadata.name, list(metadata.versions)) == (model, ["1"])
    assert [tensor.name for tensor in metadata.inputs] == inputs.split()
    assert [tensor.name for tensor in metadata.outputs] == outputs.split()
    shapes = {tensor.name: list(tensor.shape) for tensor in [*metadata.inputs, *metadata.outputs]}
    image = [3, 32, 32] if model == "gaussian" else [1, 6, 5]
    assert shapes["x"] == shapes["denoised"] == shapes["score"] == [-1, *image]
    assert shapes["sigma"] == [-1]
    assert shapes.get("log_evidence", [-1, *image[1:]]) == [-1, *image[1:]]
    types = {tensor.name: tensor.datatype for tensor in metadata.inputs}
    assert {types.pop("label", "INT64"), types.pop("window", "INT64")} == {"INT64"}
    assert set(types.values()) == {"FP32"}


def test_raw_and_typed_contents_get_the_bits_that_our_own_contract_gets(
    stub: GRPCInferenceServiceStub, client: Client
) -> None:
    x = ("x", "FP32", PIXELS.shape, PIXELS.tobytes())
    raw = infer(x, fp32("time", 0.25, 0.5), int64("label", 1, -1), int64("window", 3, 5))
    typed_contents = pb.ModelInferRequest(model_name="zeros", id="mine")
    for tensor in raw.inputs:
        typed_contents.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    columns: list[list[Any]] = [PIXELS.ravel().tolist(), [0.25, 0.5], [1, -1], [3, 5]]
    for tensor, values in zip(typed_contents.inputs, columns, strict=True):
        if tensor.datatype == "FP32":
            tensor.contents.fp32_contents.extend(values)
        else:
            tensor.contents.int64_contents.extend(values)
    options: dict[str, Any] = {"time": [0.25, 0.5], "label": [1, -1], "window": [3, 5]}
    denoised, evidence = client.denoise_with_evidence(PIXELS, model="zeros", **options)
    expected = {
        "denoised": denoised,
        "score": client.score(PIXELS, model="zeros", **options),
        "log_evidence": evidence,
    }
    for request in (raw, typed_contents):
        response = stub.ModelInfer(request, timeout=TIMEOUT_S)
        assert (response.model_name, response.model_version) == ("zeros", "1")
        assert response.id == request.id
        outputs = decoded(response)
        assert list(outputs) == list(expected)
        for name, output in outputs.items():
            assert output.tobytes() == expected[name].tobytes()


@pytest.mark.parametrize("outputs", [["score"], ["log_evidence", "denoised"]])
def test_only_the_requested_outputs_are_returned_in_their_order(
    stub: GRPCInferenceServiceStub, outputs: list[str]
) -> None:
    response = stub.ModelInfer(infer(X, SIGMA, outputs=outputs), timeout=TIMEOUT_S)
    assert [output.name for output in response.outputs] == outputs
    assert len(response.raw_output_contents) == len(outputs)


def test_a_level_may_come_with_axes_of_one(stub: GRPCInferenceServiceStub) -> None:
    scalar, column = fp32("sigma", 1.0, shape=()), fp32("sigma", 1.0, shape=(1, 1))
    first, second = (
        decoded(stub.ModelInfer(infer(X, level), timeout=TIMEOUT_S)) for level in (scalar, column)
    )
    assert first["denoised"].tobytes() == second["denoised"].tobytes()


def test_typed_contents_of_the_right_length_are_taken(stub: GRPCInferenceServiceStub) -> None:
    assert len(stub.ModelInfer(typed([0.5] * 30), timeout=TIMEOUT_S).outputs) == 3
