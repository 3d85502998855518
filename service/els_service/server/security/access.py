"""Access control: exposure of addresses, TLS, tokens and roles, lifetime of connections.

Beyond loopback a server requires TLS, or the setting ``insecure`` if a proxy in front of it
encrypts. With a token file every call needs a token except health checks, which probes send;
administrative methods need the role admin. Without tokens, administrative methods are restricted to
callers on loopback or a Unix socket: a client certificate authenticates but does not authorise. A
proxy on the same machine makes every caller local, so use tokens behind one.
"""

from __future__ import annotations

import asyncio
import resource
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, NoReturn

import grpc

from els_service.config import Settings
from els_service.errors import ElsError, LoadError, PermissionDeniedError
from els_service.server.addresses import is_local, is_loopback, with_port
from els_service.server.security import tls
from els_service.server.security.rejection_pace import RejectionPace
from els_service.server.security.tokens import Tokens
from els_service.server.transport.call_context import set_token_name
from els_service.server.transport.grpc_types import Handler

_ADMIN_SERVICES = frozenset({"grpc.channelz.v1.Channelz"})
_ADMIN_METHODS = frozenset({"RepositoryModelLoad", "RepositoryModelUnload", "LogSettings"})
_LOOPBACK = "127.0.0.1"
_IDENTITY, _GZIP = 1 << 0, 1 << 2
"""Bits of gRPC's compression algorithms."""
_PING_STRIKES = 2
"""Too frequent pings after which a connection is closed."""
_PING_JITTER = 0.8
"""Minimum ratio of the intervals at which pings arrive and at which they were sent."""

RejectMethod = Callable[[str, ElsError, Any], Awaitable[NoReturn]]
"""Ends a call with the status of an error, given the method's name and the call's context."""


class AccessControl:
    """TLS, tokens and exposure as in the settings; reads and validates the files.

    Raises:
        LoadError: The address is exposed without protection, or a file is invalid.
    """

    def __init__(self, settings: Settings) -> None:
        self._tls = tls.reloaded(settings)
        client_ca = settings.tls_client_ca is not None
        self._credentials = (
            None if self._tls is None else tls.credentials(self._tls, client_certificates=client_ca)
        )
        self._tokens = Tokens(settings.tokens) if settings.tokens else None
        self._pace = RejectionPace()
        _check_exposure(settings)

    def bind(self, server: grpc.aio.Server, address: str) -> int:
        """Bind a server to an address, and return the port.

        Raises:
            RuntimeError: The address cannot be bound.
        """
        if self._credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, self._credentials)

    def tls_context(self) -> ssl.SSLContext | None:
        """Return the context of TLS for HTTP, with the files of ``bind``; None without TLS."""
        return None if self._tls is None else tls.context_of(self._tls)

    async def check_token(self, metadata: Iterable[tuple[str, str | bytes]]) -> None:
        """Check the token in the headers of a request that is no call of a method.

        Raises:
            UnauthenticatedError: Tokens are required, and there is none, or an unknown one.
        """
        if self._tokens is None:
            return
        try:
            self._tokens.caller(metadata, admin=False)
        except ElsError:
            if delay := self._pace.delay_s():
                await asyncio.sleep(delay)
            raise

    def stale(self) -> dict[str, float]:
        """Return for how many seconds the files of ``tokens`` and ``tls`` have been invalid.

        0.0 if they are current or not used. Checks the files; thread-safe.
        """
        files = {"tokens": self._tokens, "tls": self._tls}
        return {name: one.stale_s() if one else 0.0 for name, one in files.items()}

    def protected(
        self, service: str, handlers: Mapping[str, Handler], reject: RejectMethod
    ) -> grpc.GenericRpcHandler:
        """Return a service's handlers, by method, behind the checks of token, role and address."""
        if self._tokens is not None:
            return _ByToken(service, handlers, self._tokens, _paced(reject, self._pace))
        checked = {
            method: _local_only(method, handler, reject)
            if _needs_admin(service, method)
            else handler
            for method, handler in handlers.items()
        }
        return grpc.method_handlers_generic_handler(service, checked)


class _ByToken(grpc.GenericRpcHandler):
    """Handler that authenticates calls by token before their message is read."""

    def __init__(
        self, service: str, handlers: Mapping[str, Handler], tokens: Tokens, reject: RejectMethod
    ) -> None:
        self._paths = {
            f"/{service}/{method}": (method, handler, _needs_admin(service, method))
            for method, handler in handlers.items()
        }
        self._tokens, self._reject = tokens, reject

    def service(self, details: grpc.HandlerCallDetails) -> Handler:
        """Return the handler of a call; None for another service."""
        found = self._paths.get(details.method)
        if found is None:
            return None
        method, handler, admin = found
        try:
            set_token_name(self._tokens.caller(details.invocation_metadata, admin=admin))
        except ElsError as error:
            return _rejection(method, error, self._reject)
        return handler


def _paced(reject: RejectMethod, pace: RejectionPace) -> RejectMethod:
    async def later(method: str, error: ElsError, context: Any) -> NoReturn:
        if delay := pace.delay_s():
            await asyncio.sleep(delay)
        await reject(method, error, context)

    return later


def _rejection(method: str, error: ElsError, reject: RejectMethod) -> Handler:
    # A stream handler: the other kinds read a request before they are called.
    async def call(requests: object, context: Any) -> None:
        await reject(method, error, context)

    return grpc.stream_stream_rpc_method_handler(call)


def _local_only(method: str, handler: Handler, reject: RejectMethod) -> Handler:
    """Return the handler of a unary method restricted to local callers."""

    async def call(requests: Any, context: Any) -> Any:
        if not is_local(context.peer()):
            text = f"{method}: expected a caller on loopback, as there are no tokens"
            await reject(method, PermissionDeniedError(text), context)
        return await handler.stream_unary(requests, context)

    return grpc.stream_unary_rpc_method_handler(
        call, handler.request_deserializer, handler.response_serializer
    )


def channel_options(settings: Settings) -> list[tuple[str, int]]:
    """Return the lifetime and limits of connections as gRPC channel arguments.

    ``ping_timeout_ms`` closes the connection of a peer that does not acknowledge pings; its default
    is a minute, and ``keepalive_timeout_ms`` does not affect it.
    """
    seconds = {
        "grpc.keepalive_time_ms": settings.keepalive_s,
        "grpc.keepalive_timeout_ms": settings.keepalive_timeout_s,
        "grpc.http2.ping_timeout_ms": settings.keepalive_timeout_s,
        "grpc.http2.min_ping_interval_without_data_ms": settings.client_ping_s * _PING_JITTER,
        "grpc.server_handshake_timeout_ms": settings.handshake_s,
        "grpc.max_connection_idle_ms": settings.max_connection_idle_s,
        "grpc.max_connection_age_ms": settings.max_connection_age_s,
        "grpc.max_connection_age_grace_ms": settings.max_connection_age_grace_s,
    }
    return [
        *((name, max(1, round(1e3 * value))) for name, value in seconds.items()),
        # Otherwise a second server would share the port instead of failing to bind it.
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_ping_strikes", _PING_STRIKES),
        ("grpc.max_concurrent_streams", settings.max_concurrent_streams),
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        # Messages are decompressed by the parser, which limits their size.
        ("grpc.per_message_decompression", 0),
        (
            "grpc.compression_enabled_algorithms_bitset",
            _IDENTITY | _GZIP if settings.compression else _IDENTITY,
        ),
        # Keeps the flow-control window at 64 KiB, so that unread data remain at the client.
        ("grpc.http2.bdp_probe", 0),
    ]


def allow_connections() -> None:
    """Raise the limit of open files to its maximum: each connection is one."""
    _, maximum = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (maximum, maximum))


def metrics_host(settings: Settings) -> str:
    """Return the host of the metrics port, which is plain HTTP: loopback unless configured."""
    if settings.metrics_host is not None:
        return settings.metrics_host
    return with_port(settings.host) if is_loopback(settings.host) else _LOOPBACK


def _check_exposure(settings: Settings) -> None:
    if settings.insecure or settings.tls_certificate or is_loopback(settings.host):
        return
    got = "tokens, which would be sent in plain text" if settings.tokens else "no protection"
    raise LoadError(
        "host",
        f"expected loopback, or tls_certificate and tls_key, got {settings.host} with {got}; "
        "pass --insecure if a proxy in front of it encrypts",
    )


def _needs_admin(service: str, method: str) -> bool:
    return service in _ADMIN_SERVICES or method in _ADMIN_METHODS
