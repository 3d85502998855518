"""How a channel is set up, and how its failures become errors of our own tree."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from els_client._route import Route
from els_client._types import Tls
from els_client.errors import ElsError, InvalidArgumentError, Violation, error_of

MAX_TIMEOUT_S = 365 * 86_400.0
UNARY_TIMEOUT_S = 60.0
SAMPLE_TIMEOUT_S = 600.0

Metadata = tuple[tuple[str, str], ...]
Options = tuple[tuple[str, str | int], ...]

_MAX_MESSAGE_BYTES = 64 * 2**20
# A server that takes pings every 5 s counts one that comes a little early as abuse.
_PING_EVERY_MS = 5_500
# Both together tell a server that hangs within ten seconds.
_PING_TIMEOUT_MS = 4_000
# A server that comes back is found again soon, not after up to the two minutes of grpc's default.
_RECONNECT_AT_MOST_MS = 2_000
# How soon after an answer a name may be asked again, which is when a connection ends. At grpc's
# default of 30 s a rollout could replace every server that a client knows in between.
_RESOLVE_AGAIN_MS = 2_000
# What grpc.aio says, with INTERNAL, of a message that a stream which ends does not take any more.
_NOT_TAKEN = "Internal error from Core"
# What a proxy makes of a server that is gone in the middle of an answer; no server ends a call so.
_RESET = "RST_STREAM"
# Every method is a pure question, so asking again harms nobody.
_RETRY_POLICY = {
    "maxAttempts": 4,
    "initialBackoff": "0.1s",
    "maxBackoff": "2s",
    "backoffMultiplier": 3,
    # The latter is what grpc's own shutdown makes of a call that it overtakes.
    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
}


def channel_options(*, retried: bool = True, healthy_only: bool = True) -> Options:
    """Return the options of a channel: calls go in turn to every server that says it is healthy.

    Without ``retried`` a call is one attempt, for those who count attempts; without
    ``healthy_only`` calls go to every server that answers.
    """
    service_config: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if healthy_only:
        service_config["healthCheckConfig"] = {"serviceName": ""}
    if retried:
        name = [{"service": "denoise.v1.DenoiserService"}]
        service_config["methodConfig"] = [{"name": name, "retryPolicy": _RETRY_POLICY}]
    return (
        ("grpc.service_config", json.dumps(service_config)),
        ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
        # A message larger than this buffer (by default 256 KiB) would be sent only once.
        ("grpc.per_rpc_retry_buffer_size", _MAX_MESSAGE_BYTES),
        ("grpc.enable_retries", int(retried)),
        ("grpc.keepalive_time_ms", _PING_EVERY_MS),
        ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_MS),
        # A ping that measures bandwidth holds the others back; it is given up on as they are.
        ("grpc.http2.ping_timeout_ms", _PING_TIMEOUT_MS),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_reconnect_backoff_ms", _RECONNECT_AT_MOST_MS),
        ("grpc.dns_min_time_between_resolutions_ms", _RESOLVE_AGAIN_MS),
    )


def open_channel(target: str, tls: Tls | None, *, healthy_only: bool = True) -> grpc.Channel:
    """Return a blocking channel; ``healthy_only`` as of ``channel_options``.

    Raises:
        InvalidArgumentError: A file of ``tls`` cannot be read, or a key lacks its certificate.
    """
    options = channel_options(healthy_only=healthy_only)
    options += _tls_options(tls) + _proxy_options(target)
    if tls is None:
        return grpc.insecure_channel(target, options=options)
    return grpc.secure_channel(target, _credentials(tls), options=options)


def open_async_channel(
    target: str, tls: Tls | None, options: Options | None = None
) -> grpc.aio.Channel:
    """Return a channel for asyncio; errors are those of ``open_channel``."""
    options = channel_options() if options is None else options
    options += _tls_options(tls) + _proxy_options(target)
    if tls is None:
        return grpc.aio.insecure_channel(target, options=options)
    return grpc.aio.secure_channel(target, _credentials(tls), options=options)


def bearer(token: str | None) -> Metadata:
    """Return the metadata that carries a token; the refusal of a malformed one does not show it."""
    if token is None:
        return ()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        text = "expected printable ASCII without spaces"
        raise InvalidArgumentError(f"token: {text}", [Violation("token", text)])
    return (("authorization", f"Bearer {token}"),)


def _tls_options(tls: Tls | None) -> Options:
    name = tls.server_name if tls else None
    return (("grpc.ssl_target_name_override", name),) if name else ()


def _proxy_options(target: str) -> Options:
    """Return the option that keeps calls to this machine from a proxy of the environment."""
    return (("grpc.enable_http_proxy", 0),) if Route.to(target).is_local else ()


def timeout_of(timeout_s: float | None, default_s: float) -> float:
    """Return a deadline in seconds, the default where None is given.

    Raises:
        InvalidArgumentError: It is no number, nan, 0, negative, or beyond a year.
    """
    if timeout_s is None:
        return default_s
    # Booleans are numbers, and nan fails every comparison.
    if isinstance(timeout_s, Real) and not isinstance(timeout_s, bool):
        seconds = float(timeout_s)
        if 0 < seconds <= MAX_TIMEOUT_S:
            return seconds
    expected = f"seconds, more than 0 and at most {MAX_TIMEOUT_S:.0f} (a year)"
    text = f"expected {expected}, got {timeout_s!r}"
    raise InvalidArgumentError(f"timeout_s: {text}", [Violation("timeout_s", text)])


def _credentials(tls: Tls) -> grpc.ChannelCredentials:
    if (tls.certificate is None) != (tls.key is None):
        text = "expected certificate and key together"
        raise InvalidArgumentError(f"tls: {text}", [Violation("tls", text)])
    return grpc.ssl_channel_credentials(
        _content("ca", tls.ca), _content("key", tls.key), _content("certificate", tls.certificate)
    )


def _content(field: str, path: str | Path | None) -> bytes | None:
    try:
        return Path(path).read_bytes() if path is not None else None
    except OSError as error:
        text = f"expected a file that can be read, got {path}: {error.strerror}"
        raise InvalidArgumentError(f"tls.{field}: {text}", [Violation(field, text)]) from error


@contextmanager
def own_errors(route: Route | None = None, timeout_s: float | None = None) -> Iterator[None]:
    """Raise what gRPC raises inside as an ``ElsError``, the original as its cause.

    Args:
        route: Of the channel; it explains what never reached a server or was not answered.
        timeout_s: What the whole call was allowed, for the text of one that took longer.
    """
    try:
        yield
    except grpc.RpcError as error:
        raise _translated(error, route, timeout_s) from error


def _translated(error: grpc.RpcError, route: Route | None, timeout_s: float | None) -> ElsError:
    # Both kinds of channel raise an error that is its own call, which the stubs do not say.
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError)
    metadata = dict(error.trailing_metadata() or ())
    status = _status_of(metadata.get("grpc-status-details-bin", b""))
    code = error.code().name
    if error.details() == _NOT_TAKEN:
        return error_of("UNAVAILABLE", "the stream ended while it was written to")
    if code == "INTERNAL" and _RESET in (error.details() or ""):
        return error_of("UNAVAILABLE", "the server was gone before its answer was whole")
    message = error.details() or code
    text = route.explained(code, message, timeout_s) if route else message
    return _error_of(code, text, status)


def error_of_status(status: status_pb2.Status) -> ElsError:
    """Return the error that a ``google.rpc.Status`` inside a message stands for."""
    code = next((code.name for code in grpc.StatusCode if code.value[0] == status.code), "UNKNOWN")
    return _error_of(code, status.message or code, status)


def _error_of(code: str, message: str, status: status_pb2.Status) -> ElsError:
    """Return the error with the wrong fields and the wait that ``status`` names in its details."""
    bad_request = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    violations: list[Violation] = []
    retry_after_s: float | None = None
    for detail in status.details:
        try:
            if detail.Unpack(bad_request):
                violations += [
                    Violation(v.field, v.description) for v in bad_request.field_violations
                ]
            elif detail.Unpack(retry):
                retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
        except DecodeError:
            continue
    return error_of(code, message, violations, retry_after_s)


def _status_of(details: str | bytes) -> status_pb2.Status:
    """Return a serialised google.rpc.Status; of garbage an empty one."""
    try:
        return status_pb2.Status.FromString(details)
    except DecodeError:
        return status_pb2.Status()
