"""Certificates and tokens as an operator would lay them out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import trustme
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from tests.support.refusals import TIMEOUT_S

from els_service.server.security.tokens import Role, new_token

OWN_CONNECTION = ("grpc.use_local_subchannel_pool", 1)
"""Without it channels of one process share a connection."""


@dataclass(frozen=True)
class Certificates:
    """A server's PEM files, issued by an authority of their own."""

    folder: Path
    authority: trustme.CA = field(default_factory=trustme.CA)

    @property
    def certificate(self) -> Path:
        return self.folder / "tls.crt"

    @property
    def key(self) -> Path:
        return self.folder / "tls.key"

    @property
    def client_ca(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def options(self) -> list[object]:
        return ["--tls-certificate", self.certificate, "--tls-key", self.key]

    def issue(self) -> trustme.LeafCert:
        """Write a fresh pair, and the authority; return the pair."""
        pair = self.authority.issue_cert("localhost", "127.0.0.1")
        self.key.write_bytes(pair.private_key_pem.bytes())
        self.key.chmod(0o600)
        self.certificate.write_bytes(b"".join(part.bytes() for part in pair.cert_chain_pems))
        self.client_ca.write_bytes(self.authority.cert_pem.bytes())
        return pair

    @contextmanager
    def channel(self, port: int, client: trustme.LeafCert | None = None) -> Iterator[grpc.Channel]:
        """Yield a connection of its own, with a client certificate or without."""
        shown = client and (client.private_key_pem.bytes(), client.cert_chain_pems[0].bytes())
        credentials = grpc.ssl_channel_credentials(self.authority.cert_pem.bytes(), *(shown or ()))
        target = f"localhost:{port}"
        with grpc.secure_channel(target, credentials, [OWN_CONNECTION]) as channel:
            yield channel


@dataclass(frozen=True)
class TokenFile:
    """A file of tokens that is written anew with each token."""

    path: Path
    entries: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, role: Role = "infer", expires: Any = None) -> str:
        """Return a fresh token that the file now knows."""
        token, entry = new_token(name, role, expires)
        self.entries.append(entry.model_dump(mode="json", exclude_none=True))
        self.write()
        return token

    def write(self) -> None:
        self.path.write_text(json.dumps(self.entries))
        self.path.chmod(0o600)


def bearing(token: str) -> tuple[tuple[str, str], ...]:
    """Return the metadata that show a token."""
    return (("authorization", f"Bearer {token}"),)


def healthy(channel: grpc.Channel, **options: Any) -> bool:
    """Return whether the overall health is SERVING."""
    stub: Any = HealthStub(channel)
    answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S, **options)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
