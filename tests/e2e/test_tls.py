"""TLS of a real server: certificates that are rotated, broken, missing, and asked of clients."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import trustme
from tests.e2e import frames
from tests.e2e.processes import ServerProcess, serving
from tests.e2e.refusals import TIMEOUT_S, assert_answers
from tests.e2e.security import Certificates, healthy

from els_service.wire.watched import STALE


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    made = Certificates(tmp_path_factory.mktemp("tls"))
    made.issue()
    return made


@pytest.fixture(scope="module")
def secure(models: Path, certificates: Certificates) -> Iterator[ServerProcess]:
    """A server with TLS that nobody else uses."""
    with serving("--models", models, *certificates.options, ELS_HANDSHAKE_S="0.5") as process:
        yield process


@pytest.fixture(scope="module")
def port(secure: ServerProcess) -> int:
    return int(secure.ready["grpc_port"])


def shown(certificates: Certificates, port: int) -> bytes | None:
    """Return the certificate that a new handshake is shown."""
    context = ssl.create_default_context()
    certificates.authority.configure_trust(context)
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as wrapped,
    ):
        return wrapped.getpeercert(binary_form=True)


def issued(certificates: Certificates) -> bytes:
    """Write a fresh pair and return its certificate."""
    pair = certificates.issue()
    return ssl.PEM_cert_to_DER_cert(pair.cert_chain_pems[0].bytes().decode())


def test_calls_are_answered_over_tls_and_not_in_plain_text(
    certificates: Certificates, port: int
) -> None:
    with certificates.channel(port) as channel:
        assert_answers(channel)
    with grpc.insecure_channel(f"localhost:{port}") as plain:
        with pytest.raises(grpc.RpcError) as caught:
            healthy(plain)
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_rotated_certificate_serves_new_handshakes_and_drops_no_connection(
    certificates: Certificates, port: int
) -> None:
    with certificates.channel(port) as held:
        assert healthy(held)
        seen = set()
        for _ in range(3):
            fresh_pair = issued(certificates)
            assert shown(certificates, port) == fresh_pair
            seen.add(fresh_pair)
            with certificates.channel(port) as fresh:
                assert healthy(fresh)
            assert healthy(held, wait_for_ready=False)
        assert len(seen) == 3


def test_broken_files_keep_the_old_pair_and_the_log_tells(
    certificates: Certificates, port: int, secure: ServerProcess
) -> None:
    before = issued(certificates)
    assert shown(certificates, port) == before
    whole, other = certificates.certificate.read_bytes(), certificates.authority.issue_cert("x.org")
    already = len(secure.records())
    for certificate, key in (
        (whole[: len(whole) // 2], certificates.key.read_bytes()),
        (b"", b""),
        (whole, other.private_key_pem.bytes()),
    ):
        certificates.certificate.write_bytes(certificate)
        certificates.key.write_bytes(key)
        assert shown(certificates, port) == before
    certificates.certificate.unlink()
    with certificates.channel(port) as channel:
        assert healthy(channel)
    told = [one for one in secure.records()[already:] if one["event"] == STALE]
    assert len(told) == 4
    assert all(str(certificates.certificate) in one["reason"] for one in told)
    after = issued(certificates)
    assert shown(certificates, port) == after != before


def test_with_a_client_ca_only_its_certificates_get_in(tmp_path: Path, models: Path) -> None:
    certificates, stranger = Certificates(tmp_path), trustme.CA()
    certificates.issue()
    settings = {"ELS_TLS_CLIENT_CA": str(certificates.client_ca)}
    with serving("--models", models, *certificates.options, **settings) as server:
        port = server.ready["grpc_port"]
        with certificates.channel(port, certificates.authority.issue_cert("a.org")) as known:
            assert_answers(known)
        for shown_to_it in (None, stranger.issue_cert("a.org")):
            with certificates.channel(port, shown_to_it) as unknown:
                with pytest.raises(grpc.RpcError) as caught:
                    healthy(unknown)
                assert isinstance(caught.value, grpc.Call)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01", frames.BEGINNING, bytes(4096)])
def test_a_peer_that_does_not_finish_its_handshake_is_cut_off(
    certificates: Certificates, port: int, sent: bytes
) -> None:
    with frames.connected(port, sent) as stuck, certificates.channel(port) as channel:
        assert_answers(channel)
        assert frames.HEADERS not in [kind for kind, _, _ in frames.received(stuck)]
        assert_answers(channel)
