"""TLS of a real server: certificates that are rotated, broken, missing, and required of clients."""

from __future__ import annotations

import datetime
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from tests.support import frames
from tests.support.processes import ServerProcess, serving
from tests.support.refusals import TIMEOUT_S, assert_answers
from tests.support.security import Certificates, healthy

from els_service.server.security.reloaded_file import STALE


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    made = Certificates(tmp_path_factory.mktemp("tls"))
    made.issue()
    return made


@pytest.fixture(scope="module")
def secure(models: Path, certificates: Certificates) -> Iterator[ServerProcess]:
    """A server with TLS for one test."""
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


def test_invalid_files_keep_the_old_pair_and_are_logged(
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
    stale = [one for one in secure.records()[already:] if one["event"] == STALE]
    assert len(stale) == 4
    assert all(str(certificates.certificate) in one["reason"] for one in stale)
    after = issued(certificates)
    assert shown(certificates, port) == after != before


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    made = Certificates(tmp_path_factory.mktemp("members"))
    made.issue()
    return made


@pytest.fixture(scope="module")
def mutual(models: Path, members: Certificates) -> Iterator[ServerProcess]:
    """A server that requires client certificates of ``members``."""
    settings = {"ELS_TLS_CLIENT_CA": str(members.client_ca)}
    with serving("--models", models, *members.options, **settings) as process:
        yield process


def gets_in(members: Certificates, server: ServerProcess, client: trustme.LeafCert | None) -> bool:
    """Return whether a new connection is taken; one that is not ends as UNAVAILABLE."""
    with members.channel(server.ready["grpc_port"], client) as channel:
        stub: Any = HealthStub(channel)
        call = stub.Check.future(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        assert call.code() in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE)
        return bool(call.code() is grpc.StatusCode.OK)


def trust(members: Certificates, *authorities: trustme.CA) -> None:
    """Write which authorities' clients get in from now on."""
    members.client_ca.write_bytes(b"".join(one.cert_pem.bytes() for one in authorities))


def test_with_a_client_ca_only_its_certificates_get_in(
    members: Certificates, mutual: ServerProcess
) -> None:
    stranger = trustme.CA()
    trust(members, members.authority)
    port = mutual.ready["grpc_port"]
    with members.channel(port, members.authority.issue_cert("a.org")) as known:
        assert_answers(known)
    for client in (None, stranger.issue_cert("a.org")):
        assert not gets_in(members, mutual, client)


def test_a_rotated_client_ca_takes_its_clients_alone_and_keeps_open_connections(
    members: Certificates, mutual: ServerProcess
) -> None:
    first, second = trustme.CA(), trustme.CA()
    old, new = first.issue_cert("old.org"), second.issue_cert("new.org")
    port = mutual.ready["grpc_port"]
    trust(members, first)
    with members.channel(port, old) as held:
        assert_answers(held)
        for trusted, old_in, new_in in (
            ((first,), True, False),
            ((first, second), True, True),
            ((second,), False, True),
            ((first,), True, False),
            ((second,), False, True),
        ):
            trust(members, *trusted)
            # The server's own pair is rotated with it, as a mounted secret is.
            pair = members.authority.issue_cert("localhost")
            members.key.write_bytes(pair.private_key_pem.bytes())
            members.certificate.write_bytes(pair.cert_chain_pems[0].bytes())
            assert gets_in(members, mutual, old) == old_in
            assert gets_in(members, mutual, new) == new_in
            assert not gets_in(members, mutual, None)
            # Until it is too old: max_connection_age_s.
            assert healthy(held, wait_for_ready=False)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_session_of_a_client_whose_ca_was_removed_is_not_resumed(
    members: Certificates, mutual: ServerProcess, version: ssl.TLSVersion
) -> None:
    context = ssl.create_default_context()
    members.authority.configure_trust(context)
    context.set_alpn_protocols(["h2"])
    context.maximum_version = version
    gone = trustme.CA()
    gone.issue_cert("gone.org").configure_cert(context)

    def begun(session: ssl.SSLSession | None) -> tuple[bool, ssl.SSLSession | None]:
        """Return whether a session was resumed and the new one; OSError where it is cut off."""
        plain = socket.create_connection(("127.0.0.1", mutual.ready["grpc_port"]), TIMEOUT_S)
        with plain, context.wrap_socket(plain, server_hostname="localhost", session=session) as tls:
            if not tls.recv(9):  # the head of HTTP/2's SETTINGS; tickets come before it
                raise ConnectionResetError
            return bool(tls.session_reused), tls.session

    trust(members, gone)
    _, session = begun(None)
    assert session is not None
    assert begun(session)[0]
    trust(members, members.authority)
    with pytest.raises(OSError):  # noqa: PT011 of TLS's kinds of end, any
        begun(session)


TORN: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "half": lambda whole: whole[: len(whole) // 2],
    "in a second one": lambda whole: whole + whole[: len(whole) // 2],
    "in a second one's first line": lambda whole: whole + whole[:17],
    "DER": lambda whole: ssl.PEM_cert_to_DER_cert(whole.decode()),
    "no certificate": lambda whole: revocations(),
}


@pytest.mark.parametrize("tear", TORN.values(), ids=TORN)
def test_a_truncated_client_ca_keeps_the_old_one_and_admits_no_other_client(
    members: Certificates, mutual: ServerProcess, tear: Callable[[bytes], bytes]
) -> None:
    known, other = trustme.CA(), trustme.CA()
    trust(members, known)
    member, stranger = known.issue_cert("a.org"), other.issue_cert("b.org")
    assert gets_in(members, mutual, member)
    already = len(mutual.records())
    members.client_ca.write_bytes(tear(other.cert_pem.bytes()))
    assert gets_in(members, mutual, member)
    assert not gets_in(members, mutual, stranger)
    assert not gets_in(members, mutual, None)
    stale = [one for one in mutual.records()[already:] if one["event"] == STALE]
    assert [str(members.client_ca) in one["reason"] for one in stale] == [True]
    trust(members, other)
    assert gets_in(members, mutual, stranger)
    assert not gets_in(members, mutual, member)


def revocations() -> bytes:
    """Return a PEM file of an authority's revoked certificates, and of no authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    made = x509.CertificateRevocationListBuilder(
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")]),
        last_update=now,
        next_update=now + datetime.timedelta(days=36500),
    )
    return made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01", frames.BEGINNING, bytes(4096)])
def test_a_peer_that_does_not_finish_its_handshake_is_cut_off(
    certificates: Certificates, port: int, sent: bytes
) -> None:
    with frames.connected(port, sent) as stuck, certificates.channel(port) as channel:
        assert_answers(channel)
        assert frames.HEADERS not in [kind for kind, _, _ in frames.received(stuck)]
        assert_answers(channel)
