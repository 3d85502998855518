"""How a refusal is read, and what every refusal must leave behind: a server that answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceStub

TIMEOUT_S = 30.0


def refused(ask: Callable[[], Any]) -> grpc.Call:
    """Return the call that ``ask`` made, which must fail; a stream is read to its end."""

    def complete() -> None:
        answer = ask()
        if isinstance(answer, Iterator):
            list(answer)

    with pytest.raises(grpc.RpcError) as caught:
        complete()
    assert isinstance(caught.value, grpc.Call)
    return caught.value


def violation(call: grpc.Call) -> tuple[str, str]:
    """Return field and description of the one violation in a status's details."""
    status = rpc_status.from_call(call)
    assert status is not None, call.details()
    request = error_details_pb2.BadRequest()
    (detail,) = status.details
    assert detail.Unpack(request)
    (first,) = request.field_violations
    return first.field, first.description


def assert_refused(call: grpc.Call, code: str, field: str, expected: str, got: str) -> None:
    """Check status, text and details; expected and got may be the beginnings of what is said."""
    assert call.code().name == code, call.details()
    named, description = violation(call)
    assert named == field
    assert description.startswith(f"expected {expected}"), description
    assert f", got {got}" in description
    assert call.details() == f"{field}: {description}"


def assert_answers(channel: grpc.Channel) -> None:
    """Check that the server answers a good request."""
    answer = DenoiserServiceStub(channel).Denoise(
        pb.DenoiseRequest(
            model="zeros",
            x=pb.Tensor(dtype=pb.DTYPE_F32, shape=[1, 1, 6, 5], data=bytes(120)),
            level=pb.NoiseLevel(sigma=[1.0]),
        ),
        timeout=TIMEOUT_S,
    )
    assert list(answer.denoised.shape) == [1, 1, 6, 5]
