"""Client side of the health check of ``els-server probe``; does not import torch."""

from __future__ import annotations

import socket
import ssl
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from els_service.config import Settings
from els_service.server.addresses import address_of, with_port


def ask(settings: Settings, service: str, timeout_s: float) -> str:
    """Return what the server says of ``service``: SERVING, NOT_SERVING, or why it says nothing.

    The port of health checks is asked where there is one, else that of gRPC, with TLS if the server
    has it: then only the server's own certificate is trusted, and it is shown as the caller's too.
    """
    try:
        with _channel(settings, timeout_s) as channel:
            # Its methods are made at run time, which the stubs do not say.
            stub: Any = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service=service)
            answer = stub.Check(request, timeout=timeout_s)
    except grpc.RpcError as error:
        return _told(error)
    except OSError as error:
        return f"UNAVAILABLE: {error}"
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def _told(error: grpc.RpcError) -> str:
    # A blocking channel raises an error that is its own call, which the stubs do not say.
    assert isinstance(error, grpc.Call)
    return f"{error.code().name}: {error.details()}"


def _channel(settings: Settings, timeout_s: float) -> grpc.Channel:
    host = _near(settings.host)
    options = [("grpc.enable_http_proxy", 0)]
    if settings.health_port:
        target = address_of(with_port(host), settings.health_port)
        return grpc.insecure_channel(target, options=options)
    target = address_of(host, settings.port)
    certificate, key = settings.tls_certificate, settings.tls_key
    if certificate is None or key is None:
        return grpc.insecure_channel(target, options=options)
    name = _name_shown(host, settings.port, certificate, timeout_s)
    shown = certificate.read_bytes()
    credentials = grpc.ssl_channel_credentials(shown, key.read_bytes(), shown)
    return grpc.secure_channel(
        target, credentials, options=[*options, ("grpc.ssl_target_name_override", name)]
    )


def _name_shown(host: str, port: int, certificate: Path, timeout_s: float) -> str:
    """Return a name that the server's certificate bears, as it need not bear loopback's.

    Raises:
        OSError: There is no server, or it shows another certificate than the file holds.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    # The certificate itself is what is trusted, not who issued it.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(certificate)
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, port), timeout=timeout_s) as plain,
        context.wrap_socket(plain) as wrapped,
    ):
        # Pairs of kind and name; the type that the stubs give tells less.
        names: Any = (wrapped.getpeercert() or {}).get("subjectAltName", ())
    for _, name in names:
        # One of those that a wildcard stands for.
        return str(name).replace("*", "any", 1)
    raise OSError(f"{certificate}: expected a certificate with a subjectAltName, got none")


def _near(host: str) -> str:
    """Return where a server that listens at ``host`` is reached from its own machine."""
    try:
        address = ip_address(host)
    except ValueError:
        return host
    if not address.is_unspecified:
        return host
    return "127.0.0.1" if address.version == 4 else "::1"
