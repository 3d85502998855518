"""Priority and timeout of an inference: read where Triton's clients put them, refused if wrong."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from tests.support.bad_inferences import SIGMA, X, fp32, infer
from tests.support.processes import ServerProcess
from tests.support.refusals import TIMEOUT_S, assert_refused, refused

from els_proto.inference import grpc_service_pb2 as pb
from els_proto.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub


def with_parameters(request: pb.ModelInferRequest, **parameters: Any) -> pb.ModelInferRequest:
    for name, (kind, value) in parameters.items():
        setattr(request.parameters[name], f"{kind}_param", value)
    return request


@pytest.mark.parametrize(
    "parameters",
    [
        {"priority": ("int64", 1)},
        {"priority": ("uint64", 3)},
        {"priority": ("uint64", 0), "timeout": ("int64", 0)},
        {"timeout": ("int64", 30_000_000)},
        {"timeout": ("uint64", 2**63 - 1)},
        {"somebody_elses": ("string", "is none of ours")},
    ],
)
def test_legal_parameters_are_taken(channel: grpc.Channel, parameters: Any) -> None:
    request = with_parameters(infer(X, SIGMA), **parameters)
    assert GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=TIMEOUT_S).outputs


_WHOLE = "int64_param or uint64_param"
_MOST = 2**63 - 1


@pytest.mark.parametrize(
    ("name", "parameter", "expected", "got"),
    [
        ("priority", ("int64", -1), "0 to 3", "-1"),
        ("priority", ("uint64", 4), "0 to 3", "4"),
        ("priority", ("double", 1.0), _WHOLE, "double_param"),
        ("priority", ("string", "1"), _WHOLE, "string_param"),
        ("timeout", ("int64", -5), f"0 to {_MOST}", "-5"),
        ("timeout", ("uint64", 2**64 - 1), f"0 to {_MOST}", str(2**64 - 1)),
        ("timeout", ("bool", True), _WHOLE, "bool_param"),
    ],
)
def test_an_illegal_parameter_is_refused(
    channel: grpc.Channel, name: str, parameter: Any, expected: str, got: str
) -> None:
    request = with_parameters(infer(X, SIGMA), **{name: parameter})
    stub = GRPCInferenceServiceStub(channel)
    call = refused(lambda: stub.ModelInfer(request, timeout=TIMEOUT_S))
    assert_refused(call, "INVALID_ARGUMENT", f"parameters.{name}", expected, got)


def test_an_empty_parameter_is_refused(channel: grpc.Channel) -> None:
    request = infer(X, SIGMA)
    request.parameters["timeout"].SetInParent()
    stub = GRPCInferenceServiceStub(channel)
    call = refused(lambda: stub.ModelInfer(request, timeout=TIMEOUT_S))
    assert_refused(call, "INVALID_ARGUMENT", "parameters.timeout", _WHOLE, "nothing")


def test_a_timeout_counts_in_microseconds(fault_server: ServerProcess) -> None:
    one = fp32("x", *[1.0] * 30, shape=(1, 1, 6, 5))
    request = with_parameters(infer(one, SIGMA, model="slow"), timeout=("int64", 1000))
    ample = with_parameters(infer(one, SIGMA, model="slow"), timeout=("int64", 20_000_000))
    with grpc.insecure_channel(fault_server.target) as channel:
        stub = GRPCInferenceServiceStub(channel)
        for _ in range(4):  # by now what an image takes is known
            assert stub.ModelInfer(ample, timeout=TIMEOUT_S).outputs
        call = refused(lambda: stub.ModelInfer(request, timeout=TIMEOUT_S))
    assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "predicted" in str(call.details())
