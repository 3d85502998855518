"""Access control: exposure of addresses, TLS, tokens and roles, lifetime of connections.

Beyond loopback a server listens with TLS, or where ``insecure`` says that something in front of it
encrypts. Once there are tokens every call needs one but health checks, which probes ask; methods of
administration need the role admin. Without tokens those are left to callers on loopback or on a
socket of the file system: a client certificate says who somebody is, not what they may do. A proxy
on the same machine makes everybody such a caller, so behind one there should be tokens.
"""

from __future__ import annotations

import resource
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NoReturn

import grpc

from els_service.config import Settings
from els_service.errors import ElsError, LoadError, PermissionDeniedError
from els_service.server.addresses import is_local, is_loopback, with_port
from els_service.server.security import tls
from els_service.server.security.tokens import Tokens
from els_service.server.transport.caller import set_token_name

_ADMIN_SERVICES = frozenset({"grpc.channelz.v1.Channelz"})
_ADMIN_METHODS = frozenset({"RepositoryModelLoad", "RepositoryModelUnload", "LogSettings"})
_LOOPBACK = "127.0.0.1"
_IDENTITY, _GZIP = 1 << 0, 1 << 2
"""Bits of gRPC's compression algorithms."""
_PING_STRIKES = 2
"""Pings in too much haste before a connection is closed."""
_PING_JITTER = 0.8
"""A client's clock and the way make pings come closer together than they were sent."""

Handler = Any
"""A ``grpc.RpcMethodHandler``; its stubs cannot say of which request."""
Refuse = Callable[[str, ElsError, Any], Awaitable[NoReturn]]
"""Ends a call, by the method's name and its context, with an error's status."""


class AccessControl:
    """The doors that the settings describe; files are read and judged at once.

    Raises:
        LoadError: The address is open to others and nothing guards it, or a file does not fit.
    """

    def __init__(self, settings: Settings) -> None:
        self._tls = tls.watched(settings)
        asks = settings.tls_client_ca is not None
        self._credentials = (
            None if self._tls is None else tls.credentials(self._tls, client_certificates=asks)
        )
        self._tokens = Tokens(settings.tokens) if settings.tokens else None
        _check_exposure(settings)

    def bind(self, server: grpc.aio.Server, address: str) -> int:
        """Return the port that a server now listens on.

        Raises:
            RuntimeError: It cannot.
        """
        if self._credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, self._credentials)

    def stale(self) -> dict[str, float]:
        """Return, for ``tokens`` and ``tls``, how long their files have been unusable, in seconds.

        0.0 where they are current or not used. Looks at the files, in whichever thread.
        """
        watched = {"tokens": self._tokens, "tls": self._tls}
        return {name: one.stale_s() if one else 0.0 for name, one in watched.items()}

    def guarded(
        self, service: str, handlers: Mapping[str, Handler], refuse: Refuse
    ) -> grpc.GenericRpcHandler:
        """Return a service's handlers, by method, for callers who may call them."""
        if self._tokens is not None:
            return _ByToken(service, handlers, self._tokens, refuse)
        admitted = {
            method: _local_only(method, handler, refuse)
            if _needs_admin(service, method)
            else handler
            for method, handler in handlers.items()
        }
        return grpc.method_handlers_generic_handler(service, admitted)


class _ByToken(grpc.GenericRpcHandler):
    """Takes the calls that show a token, before anything of their message is read."""

    def __init__(
        self, service: str, handlers: Mapping[str, Handler], tokens: Tokens, refuse: Refuse
    ) -> None:
        self._paths = {
            f"/{service}/{method}": (method, handler, _needs_admin(service, method))
            for method, handler in handlers.items()
        }
        self._tokens, self._refuse = tokens, refuse

    def service(self, details: grpc.HandlerCallDetails) -> Handler:
        """Return the handler of a call, None where it is another service's."""
        found = self._paths.get(details.method)
        if found is None:
            return None
        method, handler, admin = found
        try:
            set_token_name(self._tokens.caller(details.invocation_metadata, admin=admin))
        except ElsError as error:
            return _refusal(method, error, self._refuse)
        return handler


def _refusal(method: str, error: ElsError, refuse: Refuse) -> Handler:
    # Of streams, as those alone do not read before they answer.
    async def call(requests: object, context: Any) -> None:
        await refuse(method, error, context)

    return grpc.stream_stream_rpc_method_handler(call)


def _local_only(method: str, handler: Handler, refuse: Refuse) -> Handler:
    """Return the handler of a method with one answer for callers on loopback."""

    async def call(requests: Any, context: Any) -> Any:
        if not is_local(context.peer()):
            text = f"{method}: expected a caller on loopback, as there are no tokens"
            await refuse(method, PermissionDeniedError(text), context)
        return await handler.stream_unary(requests, context)

    return grpc.stream_unary_rpc_method_handler(
        call, handler.request_deserializer, handler.response_serializer
    )


def channel_options(settings: Settings) -> list[tuple[str, int]]:
    """Return how long connections live and what they may carry, as gRPC's channel arguments.

    A peer that answers no ping is cut off by the ping's timeout, a minute unless it is set;
    keepalive's own counts something else.
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
        # Otherwise a second server would share the port instead of being told.
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_ping_strikes", _PING_STRIKES),
        ("grpc.max_concurrent_streams", settings.max_concurrent_streams),
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        # Messages are decompressed by deserializers, which bound it.
        ("grpc.per_message_decompression", 0),
        (
            "grpc.compression_enabled_algorithms_bitset",
            _IDENTITY | _GZIP if settings.compression else _IDENTITY,
        ),
        # What is not read waits at the caller: a stream's first 64 KiB alone are sent unasked.
        ("grpc.http2.bdp_probe", 0),
    ]


def allow_connections() -> None:
    """Let this process open as many files as it may: each connection is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def metrics_host(settings: Settings) -> str:
    """Return where metrics are served, which is plain HTTP: on loopback unless another is named."""
    if settings.metrics_host is not None:
        return settings.metrics_host
    return with_port(settings.host) if is_loopback(settings.host) else _LOOPBACK


def _check_exposure(settings: Settings) -> None:
    if settings.insecure or settings.tls_certificate or is_loopback(settings.host):
        return
    got = "tokens, which would travel in plain text" if settings.tokens else "no protection"
    raise LoadError(
        "host",
        f"expected loopback, or tls_certificate and tls_key, got {settings.host} with {got}; "
        "say --insecure if something in front of it encrypts",
    )


def _needs_admin(service: str, method: str) -> bool:
    return service in _ADMIN_SERVICES or method in _ADMIN_METHODS
