"""TLS from PEM files: every handshake uses the newest complete pair."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from els_service.config import Settings
from els_service.errors import LoadError
from els_service.server.security.reloaded_file import ReloadedFile, warn_if_public


@dataclass(frozen=True)
class _Files:
    certificate: Path
    key: Path
    client_ca: Path | None

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(path for path in (self.certificate, self.key, self.client_ca) if path)


@dataclass(frozen=True)
class Certificates:
    """Content of the files, for gRPC and as a context of Python's ``ssl``."""

    grpc: grpc.ServerCertificateConfiguration
    context: ssl.SSLContext


ReloadedTls = ReloadedFile[Certificates]


def reloaded(settings: Settings) -> ReloadedTls | None:
    """Return the reloaded files of certificate, key and client CA; None without TLS.

    Raises:
        LoadError: A file is missing in the settings, unreadable or invalid.
    """
    files = _files(settings)
    return None if files is None else ReloadedFile(files.paths, lambda: _read(files))


def credentials(files: ReloadedTls, *, client_certificates: bool) -> grpc.ServerCredentials:
    """Return the server's credentials.

    A changed file applies from the next handshake on; open connections are not affected.

    Args:
        files: as returned by ``reloaded``.
        client_certificates: whether handshakes require a certificate of the client CA.
    """
    served = files.current()

    def newest() -> grpc.ServerCertificateConfiguration | None:
        # None keeps the previous one: gRPC takes longer to build a context than for a handshake.
        nonlocal served
        current = files.current()
        if current is served:
            return None
        served = current
        return current.grpc

    return grpc.dynamic_ssl_server_credentials(
        served.grpc,
        newest,  # type: ignore[arg-type]  # the stubs lack None, which means no change
        require_client_authentication=client_certificates,
    )


def context_of(files: ReloadedTls) -> ssl.SSLContext:
    """Return a context whose handshakes use the newest files, as those of ``credentials``."""
    first = files.current().context

    def newest(connection: ssl.SSLObject, _: str | None, __: ssl.SSLContext) -> None:
        # OpenSSL calls this in every handshake, also without a server name.
        current = files.current().context
        if current is not first:
            connection.context = current

    first.sni_callback = newest
    return first


def _files(settings: Settings) -> _Files | None:
    certificate, key = settings.tls_certificate, settings.tls_key
    if certificate and key:
        return _Files(certificate, key, settings.tls_client_ca)
    for name in ("tls_certificate", "tls_key", "tls_client_ca"):
        if path := getattr(settings, name):
            missing = "tls_key" if certificate else "tls_certificate"
            raise LoadError(name, f"expected {missing} beside it, got {path} alone")
    return None


def _read(files: _Files) -> Certificates:
    """Return the validated content of the files; gRPC would only log a fault."""
    context = _context()
    try:
        # An empty password: without one OpenSSL would prompt on a terminal.
        context.load_cert_chain(files.certificate, files.key, password="")
        if files.client_ca:
            context.load_verify_locations(files.client_ca)
            if not context.cert_store_stats()["x509"]:
                raise ValueError(f"no certificate in {files.client_ca}")
            context.verify_mode = ssl.CERT_REQUIRED
            # Older versions would resume a session without asking for the certificate.
            context.minimum_version = ssl.TLSVersion.TLSv1_3
        pair = files.key.read_bytes(), files.certificate.read_bytes()
        authorities = files.client_ca.read_bytes() if files.client_ca else None
        for content in (*pair, authorities or b""):
            _check_whole(content)
    except (OSError, ValueError) as error:
        names = ", ".join(map(str, files.paths))
        raise LoadError(names, f"expected a certificate, its key and PEM, got {error}") from error
    warn_if_public(files.key)
    return Certificates(grpc.ssl_server_certificate_configuration([pair], authorities), context)


def _context() -> ssl.SSLContext:
    """Return a context of HTTP/1.1 without resumption, which would skip a client's certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    context.set_alpn_protocols(["http/1.1"])
    return context


def _check_whole(content: bytes) -> None:
    """Raise ValueError for PEM that is truncated in a block's first line, which OpenSSL ignores."""
    if content.count(b"-----BEGIN") != content.count(b"-----END"):
        raise ValueError("a block without an end")
