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


def check(settings: Settings, service: str, timeout_s: float) -> str:
    """Return the status of ``service``: SERVING, NOT_SERVING, or the error of the health check.

    Uses the health port if there is one, else the gRPC port, with TLS if the server has it. Then
    only the server's certificate is trusted, and it also serves as the client certificate.
    """
    try:
        with _channel(settings, timeout_s) as channel:
            # Its methods are created at run time, so the stubs lack them.
            stub: Any = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service=service)
            response = stub.Check(request, timeout=timeout_s)
    except grpc.RpcError as error:
        return _status_of(error)
    except OSError as error:
        return f"UNAVAILABLE: {error}"
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))


def _status_of(error: grpc.RpcError) -> str:
    # A blocking channel raises an error that is also the call, which the stubs do not declare.
    assert isinstance(error, grpc.Call)
    return f"{error.code().name}: {error.details()}"


def _channel(settings: Settings, timeout_s: float) -> grpc.Channel:
    host = _reachable(settings.host)
    options = [("grpc.enable_http_proxy", 0)]
    if settings.health_port:
        target = address_of(with_port(host), settings.health_port)
        return grpc.insecure_channel(target, options=options)
    target = address_of(host, settings.port)
    certificate, key = settings.tls_certificate, settings.tls_key
    if certificate is None or key is None:
        return grpc.insecure_channel(target, options=options)
    name = _certificate_name(host, settings.port, certificate, timeout_s)
    chain = certificate.read_bytes()
    credentials = grpc.ssl_channel_credentials(chain, key.read_bytes(), chain)
    return grpc.secure_channel(
        target, credentials, options=[*options, ("grpc.ssl_target_name_override", name)]
    )


def _certificate_name(host: str, port: int, certificate: Path, timeout_s: float) -> str:
    """Return a name of the server's certificate, which need not include loopback.

    Raises:
        OSError: No server listens, or its certificate is not that of the file.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    # The certificate itself is trusted, not its issuer.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(certificate)
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, port), timeout=timeout_s) as plain,
        context.wrap_socket(plain) as wrapped,
    ):
        # Pairs of kind and name; the declared type is less specific.
        names: Any = (wrapped.getpeercert() or {}).get("subjectAltName", ())
    for _, name in names:
        # A name that matches a wildcard.
        return str(name).replace("*", "any", 1)
    raise OSError(f"{certificate}: expected a certificate with a subjectAltName, got none")


def _reachable(host: str) -> str:
    """Return the host under which a server that listens at ``host`` is reachable locally."""
    try:
        address = ip_address(host)
    except ValueError:
        return host
    if not address.is_unspecified:
        return host
    return "127.0.0.1" if address.version == 4 else "::1"
