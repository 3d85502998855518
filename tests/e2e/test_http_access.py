"""Tokens and TLS at the HTTP port, as at gRPC's."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from tests.support.http_client import TIMEOUT_S, HttpClient
from tests.support.processes import ServerProcess, serving
from tests.support.security import Certificates, TokenFile

from els_service.server.security.reloaded_file import STALE

HANDSHAKE_S = 5
SAMPLE = "/v1/models/zeros:sample?steps=2"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    made = Certificates(tmp_path_factory.mktemp("http-tls"))
    made.issue()
    return made


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tokens by role, and the file."""
    file = TokenFile(tmp_path_factory.mktemp("http-tokens") / "tokens.json")
    return {"infer": file.add("reader"), "admin": file.add("boss", "admin"), "file": str(file.path)}


@pytest.fixture(scope="module")
def secure(
    models: Path, certificates: Certificates, tokens: dict[str, str]
) -> Iterator[ServerProcess]:
    """A server with tokens, TLS and client certificates."""
    options = ["--models", models, "--threads", 1, "--http-port", 0, *certificates.options]
    settings = {
        "ELS_TLS_CLIENT_CA": str(certificates.client_ca),
        "ELS_TOKENS": tokens["file"],
        "ELS_HANDSHAKE_S": str(HANDSHAKE_S),
    }
    with serving(*options, **settings) as process:
        yield process


def context_of(
    certificates: Certificates, client: trustme.LeafCert | None, **changes: Any
) -> ssl.SSLContext:
    """Return a client's context with a certificate or without."""
    context = ssl.create_default_context()
    certificates.authority.configure_trust(context)
    if client is not None:
        client.configure_cert(context)
    for name, value in changes.items():
        setattr(context, name, value)
    return context


@pytest.fixture
def member(certificates: Certificates) -> trustme.LeafCert:
    return certificates.authority.issue_cert("member.org")


def test_a_call_needs_a_token_before_its_body_is_read(
    secure: ServerProcess, certificates: Certificates, member: Any, tokens: dict[str, str]
) -> None:
    port, context = secure.ready["http_port"], context_of(certificates, member)
    with HttpClient(port, context) as http:
        for headers in ({}, {"Authorization": "Bearer nonsense"}, {"Authorization": "Basic eA=="}):
            reply = http.post(SAMPLE, b"no JSON", **headers)
            assert (reply.status, reply.json["code"]) == (401, "UNAUTHENTICATED")
            assert (reply.headers["www-authenticate"], reply.headers["connection"]) == (
                *("Bearer", "close"),
            )
        bearer = {"Authorization": f"Bearer {tokens['infer']}"}
        assert http.post(SAMPLE, **bearer).status == 200
        assert http.get("/v1/models", **bearer).status == 200
        load = "/v2/repository/models/zeros/load"
        reply = http.post(load, {}, **bearer)
        assert (reply.status, reply.json["code"]) == (403, "PERMISSION_DENIED")
        admin = {"Authorization": f"Bearer {tokens['admin']}"}
        assert http.post(load, {}, **admin).status == 200
        assert http.get("/v1/status").status == 401
        assert http.get("/v1/status", **bearer).json["server"]["serving"] == 1
        # The page has nothing to protect, and asks for the token.
        assert http.get("/").status == 200
        # Of probes, which have no token.
        assert http.get("/v2/health/ready").status == 200


def test_a_client_without_a_certificate_of_the_authority_gets_no_answer(
    secure: ServerProcess, certificates: Certificates, member: Any
) -> None:
    port = secure.ready["http_port"]
    stranger = trustme.CA().issue_cert("stranger.org")
    with HttpClient(port, context_of(certificates, member)) as http:
        assert http.get("/v2/health/live").status == 200
    for client in (None, stranger):
        with (
            HttpClient(port, context_of(certificates, client)) as http,
            pytest.raises((ssl.SSLError, ConnectionError)),
        ):
            http.get("/v2/health/live")
    with (
        HttpClient(
            port, context_of(certificates, member, maximum_version=ssl.TLSVersion.TLSv1_2)
        ) as old,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        old.get("/v2/health/live")


def test_a_rotated_certificate_serves_new_handshakes_and_drops_no_connection(
    secure: ServerProcess, certificates: Certificates, member: Any
) -> None:
    port, context = secure.ready["http_port"], context_of(certificates, member)

    def shown() -> bytes | None:
        plain = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
        with plain, context.wrap_socket(plain, server_hostname="localhost") as tls:
            return tls.getpeercert(binary_form=True)

    with HttpClient(port, context) as held:
        assert held.get("/v2/health/live").status == 200
        for _ in range(2):
            pair = certificates.issue()
            expected = ssl.PEM_cert_to_DER_cert(pair.cert_chain_pems[0].bytes().decode())
            assert shown() == expected
            assert held.get("/v2/health/live").status == 200
        certificates.certificate.write_bytes(b"")
        assert shown() == expected
        assert [one for one in secure.records() if one["event"] == STALE]
        certificates.issue()


def test_a_rotated_client_authority_admits_its_clients_alone(
    secure: ServerProcess, certificates: Certificates
) -> None:
    first, second = trustme.CA(), trustme.CA()
    port = secure.ready["http_port"]

    def admitted(client: trustme.LeafCert) -> bool:
        with HttpClient(port, context_of(certificates, client)) as http:
            try:
                return http.get("/v2/health/live").status == 200
            except (ssl.SSLError, ConnectionError):
                return False

    old, new = first.issue_cert("old.org"), second.issue_cert("new.org")
    for trusted in (first, second):
        certificates.client_ca.write_bytes(trusted.cert_pem.bytes())
        assert (admitted(old), admitted(new)) == (trusted is first, trusted is second)
    certificates.issue()


def test_a_handshake_that_is_not_completed_ends_after_its_time(secure: ServerProcess) -> None:
    address, began = ("127.0.0.1", secure.ready["http_port"]), time.monotonic()
    with socket.create_connection(address, TIMEOUT_S) as silent:
        assert silent.recv(1) == b""
    assert HANDSHAKE_S - 1 < time.monotonic() - began < TIMEOUT_S - 1


def test_plain_http_at_a_port_with_tls_gets_no_answer(secure: ServerProcess) -> None:
    with HttpClient(secure.ready["http_port"]) as http, pytest.raises(ConnectionError):
        http.get("/v2/health/live")
