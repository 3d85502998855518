"""How a channel is set up, and how its failures become errors of our own tree."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from els_client.errors import ElsError, Violation, error_of

UNARY_TIMEOUT_S = 60.0
SAMPLE_TIMEOUT_S = 600.0

_MAX_MESSAGE_BYTES = 64 * 2**20
# Every method is a pure question, so asking again harms nobody.
_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{"service": "denoise.v1.DenoiserService"}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 3,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}
CHANNEL_OPTIONS = (
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    # A message larger than this buffer (by default 256 KiB) would be sent only once.
    ("grpc.per_rpc_retry_buffer_size", _MAX_MESSAGE_BYTES),
)


@contextmanager
def own_errors() -> Iterator[None]:
    """Raise what gRPC raises inside as an ``ElsError``, the original as its cause."""
    try:
        yield
    except grpc.RpcError as error:
        raise _translated(error) from error


def _translated(error: grpc.RpcError) -> ElsError:
    # Both kinds of channel raise an error that is its own call, which the stubs do not say.
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError)
    metadata = dict(error.trailing_metadata() or ())
    violations = _violations(metadata.get("grpc-status-details-bin", b""))
    return error_of(error.code().name, error.details() or error.code().name, violations)


def _violations(details: str | bytes) -> list[Violation]:
    """Return the wrong fields that a serialised google.rpc.Status names; of garbage, none."""
    request = error_details_pb2.BadRequest()
    try:
        return [
            Violation(violation.field, violation.description)
            for detail in status_pb2.Status.FromString(details).details
            if detail.Unpack(request)
            for violation in request.field_violations
        ]
    except DecodeError:
        return []
