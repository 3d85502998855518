"""Channel options, and conversion of gRPC errors to ``ElsError``."""

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
# A server that allows pings every 5 s treats a slightly early one as abuse.
_PING_EVERY_MS = 5_500
# Together they detect a hung server within ten seconds.
_PING_TIMEOUT_MS = 4_000
# A restarted server is found soon; the default of grpc is up to two minutes.
_RECONNECT_AT_MOST_MS = 2_000
# Minimum interval of name resolution, which happens when a connection ends. At grpc's default
# of 30 s a rollout could replace every known server within one interval.
_RESOLVE_AGAIN_MS = 2_000
# Text of grpc.aio, with INTERNAL, for a message written to a stream that is ending.
_NOT_TAKEN = "Internal error from Core"
# Text from a proxy whose server disconnected within a response; servers never send it.
_RESET = "RST_STREAM"
# Every method is idempotent, so retries are safe.
_RETRY_POLICY = {
    "maxAttempts": 4,
    "initialBackoff": "0.1s",
    "maxBackoff": "2s",
    "backoffMultiplier": 3,
    # The latter results from a call that races with grpc's own shutdown.
    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
}


def channel_options(*, retried: bool = True, healthy_only: bool = True) -> Options:
    """Return the options of a channel: round robin over all healthy servers.

    Without ``retried`` a call is a single attempt; without ``healthy_only`` calls also go to
    servers that are not healthy.
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
        # A message larger than this buffer (by default 256 KiB) would not be retried.
        ("grpc.per_rpc_retry_buffer_size", _MAX_MESSAGE_BYTES),
        ("grpc.enable_retries", int(retried)),
        ("grpc.keepalive_time_ms", _PING_EVERY_MS),
        ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_MS),
        # A bandwidth probe delays keepalive pings, so it has the same timeout.
        ("grpc.http2.ping_timeout_ms", _PING_TIMEOUT_MS),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_reconnect_backoff_ms", _RECONNECT_AT_MOST_MS),
        ("grpc.dns_min_time_between_resolutions_ms", _RESOLVE_AGAIN_MS),
    )


def open_channel(target: str, tls: Tls | None, *, healthy_only: bool = True) -> grpc.Channel:
    """Return a blocking channel; ``healthy_only`` as for ``channel_options``.

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
    """Return a channel for asyncio; raises the errors of ``open_channel``."""
    options = channel_options() if options is None else options
    options += _tls_options(tls) + _proxy_options(target)
    if tls is None:
        return grpc.aio.insecure_channel(target, options=options)
    return grpc.aio.secure_channel(target, _credentials(tls), options=options)


def bearer(token: str | None) -> Metadata:
    """Return the metadata with a token; the error for a malformed one does not contain it."""
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
    """Return the option that disables the environment's proxy for targets on this machine."""
    return (("grpc.enable_http_proxy", 0),) if Route.to(target).is_local else ()


def timeout_of(timeout_s: float | None, default_s: float) -> float:
    """Return a deadline in seconds; None means the default.

    Raises:
        InvalidArgumentError: Not a number, nan, 0, negative, or more than a year.
    """
    if timeout_s is None:
        return default_s
    # bool is a subclass of int, and every comparison with nan is false.
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
    """Convert gRPC errors inside to an ``ElsError`` with the original as its cause.

    Args:
        route: Route of the channel; explains why a call did not reach a server.
        timeout_s: Deadline of the whole call in seconds, for the text of a timeout.
    """
    try:
        yield
    except grpc.RpcError as error:
        raise _translated(error, route, timeout_s) from error


def _translated(error: grpc.RpcError, route: Route | None, timeout_s: float | None) -> ElsError:
    # The errors of both kinds of channel are calls as well, which the stubs do not declare.
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError)
    metadata = dict(error.trailing_metadata() or ())
    status = _status_of(metadata.get("grpc-status-details-bin", b""))
    code = error.code().name
    if error.details() == _NOT_TAKEN:
        return error_of("UNAVAILABLE", "the stream ended during a write")
    if code == "INTERNAL" and _RESET in (error.details() or ""):
        return error_of("UNAVAILABLE", "the server disconnected before its response was complete")
    message = error.details() or code
    text = route.explained(code, message, timeout_s) if route else message
    return _error_of(code, text, status)


def error_of_status(status: status_pb2.Status) -> ElsError:
    """Return the error for a ``google.rpc.Status`` in a message."""
    code = next((code.name for code in grpc.StatusCode if code.value[0] == status.code), "UNKNOWN")
    return _error_of(code, status.message or code, status)


def _error_of(code: str, message: str, status: status_pb2.Status) -> ElsError:
    """Return the error with the violations and the retry delay in the details of ``status``."""
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
    """Parse a google.rpc.Status; return an empty one if it is malformed."""
    try:
        return status_pb2.Status.FromString(details)
    except DecodeError:
        return status_pb2.Status()
