"""How a client gets in: certificates, tokens, and which of several servers it asks."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
import pytest
import trustme
from grpc_health.v1 import health, health_pb2
from tests.support.fake_server import FakeDenoiser, served
from tests.support.twin import Twin
from typer.testing import CliRunner

from els_client import AsyncClient, Client, InvalidArgumentError, Tls, UnavailableError
from els_client.cli import app

X = np.zeros((1, 1, 4, 6), np.float32)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
Kind = type[Client] | type[AsyncClient]


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def tls(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Tls:
    folder = tmp_path_factory.mktemp("tls")
    own = authority.issue_cert("somebody@els.example")
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    own.cert_chain_pems[0].write_to_path(str(folder / "own.pem"))
    own.private_key_pem.write_to_path(str(folder / "own.key"))
    return Tls(ca=folder / "ca.pem", certificate=folder / "own.pem", key=str(folder / "own.key"))


@pytest.fixture
def locked(fake: FakeDenoiser, authority: trustme.CA) -> Iterator[str]:
    """Yield the address of a server that lets nobody in without a certificate."""
    server = authority.issue_cert("127.0.0.1", "els.example")
    credentials = grpc.ssl_server_credentials(
        [(server.private_key_pem.bytes(), server.cert_chain_pems[0].bytes())],
        authority.cert_pem.bytes(),
        require_client_auth=True,
    )
    with served(fake, credentials=credentials) as target:
        yield target


async def test_both_sides_show_their_certificates(
    kind: Kind, locked: str, tls: Tls, fake: FakeDenoiser
) -> None:
    twin = Twin(kind(locked, tls=tls, token="secret"))
    await twin.call("denoise", X, model="fashion-els", sigma=0.5)
    assert fake.metadata[0]["authorization"] == "Bearer secret"
    await twin.close()


@pytest.mark.slow
async def test_a_server_may_bear_another_name_than_its_address(
    kind: Kind, locked: str, tls: Tls
) -> None:
    for name, right in (("els.example", True), ("stranger.example", False)):
        named = Tls(ca=tls.ca, certificate=tls.certificate, key=tls.key, server_name=name)
        twin = Twin(kind(locked, tls=named, timeout_s=10))
        if right:
            assert await twin.call("models")
        else:
            with pytest.raises(UnavailableError):
                await twin.call("models")
        await twin.close()


@pytest.mark.slow
async def test_who_has_no_certificate_or_does_not_encrypt_stays_outside(
    kind: Kind, locked: str, tls: Tls
) -> None:
    for insufficient in (Tls(ca=tls.ca), None):
        twin = Twin(kind(locked, tls=insufficient, timeout_s=10))
        with pytest.raises(UnavailableError):
            await twin.call("models")
        await twin.close()


async def test_files_that_are_no_certificates_are_named(kind: Kind, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"tls\.ca: expected a file .*none\.pem"):
        kind(tls=Tls(ca=tmp_path / "none.pem"))
    with pytest.raises(InvalidArgumentError, match="certificate and key together"):
        kind(tls=Tls(certificate=tmp_path / "own.pem"))


async def test_every_call_carries_the_token(twin: Twin, target: str, fake: FakeDenoiser) -> None:
    with_token = Twin(type(twin.client)(target, token="a.b-c"))
    await with_token.call("score", X, model="fashion-els", sigma=0.5)
    await with_token.steps(model="fashion-els", steps=1)
    assert [one["authorization"] for one in fake.metadata] == ["Bearer a.b-c"] * 2
    await with_token.close()


@pytest.mark.parametrize("token", ["", "with space", "two\nlines", "ümlaut"])
async def test_a_malformed_token_is_refused_and_not_shown(kind: Kind, token: str) -> None:
    with pytest.raises(InvalidArgumentError, match="token: expected printable") as caught:
        kind(token=token)
    assert not token or token not in str(caught.value)


@pytest.mark.slow
def test_the_command_line_takes_certificates_and_token_from_files(
    locked: str, tls: Tls, fake: FakeDenoiser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "token").write_text("from-a-file\n")
    for name, value in (
        ("ELS_TARGET", locked),
        ("ELS_CA", str(tls.ca)),
        ("ELS_CERTIFICATE", str(tls.certificate)),
        ("ELS_KEY", str(tls.key)),
        ("ELS_TOKEN_FILE", "token"),
    ):
        monkeypatch.setenv(name, value)
    assert CliRunner().invoke(app, ["sample", "--steps", "1"]).exit_code == 0
    assert fake.metadata[-1]["authorization"] == "Bearer from-a-file"
    # Flags outrank variables.
    assert CliRunner().invoke(app, ["--target", "127.0.0.1:1", "models"]).exit_code == 4
    assert CliRunner().invoke(app, ["models", "--target", "127.0.0.1:1"]).exit_code == 4
    (tmp_path / "other").write_text("another")
    CliRunner().invoke(app, ["--token-file", "other", "sample", "--steps", "1"])
    assert fake.metadata[-1]["authorization"] == "Bearer another"


async def test_calls_go_in_turn_to_every_server_that_says_it_is_healthy(kind: Kind) -> None:
    fakes = [FakeDenoiser() for _ in range(3)]
    states = [health.HealthServicer() for _ in fakes]
    states[0].set("", NOT_SERVING)
    with ExitStack() as stack:
        targets = [
            stack.enter_context(served(fake, health_of=state))
            for fake, state in zip(fakes, states, strict=True)
        ]
        twin = Twin(kind("ipv4:" + ",".join(targets)))

        async def asked_until(*expected: bool) -> None:
            until = time.monotonic() + 20
            while True:
                for fake in fakes:
                    fake.requests.clear()
                for _ in range(6):
                    await twin.call("models")
                if tuple(len(fake.requests) > 0 for fake in fakes) == expected:
                    return
                assert time.monotonic() < until

        await asked_until(False, True, True)
        states[0].set("", SERVING)
        states[1].set("", NOT_SERVING)
        await asked_until(True, False, True)
        await twin.close()


@pytest.mark.slow
async def test_a_connection_that_hangs_is_noticed_by_its_pings(target: str) -> None:
    host, _, port = target.rpartition(":")
    with Hole(host, int(port)) as hole:
        async with AsyncClient(hole.target) as client:
            steps = client.sample(model="endless")
            await anext(steps)
            hole.swallow.set()
            with pytest.raises(UnavailableError, match="ping timeout"):
                await anext(steps)


class Hole:
    """A relay that can fall silent with its connections open, as a dead machine does."""

    def __init__(self, host: str, port: int) -> None:
        self.swallow = threading.Event()
        self._upstream = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: list[socket.socket] = [self._listener]

    def __enter__(self) -> Hole:
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # Ends the wait for a connection.
        self._accepting.join()
        for one in self._sockets:
            one.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(near)
            if self.swallow.is_set():
                continue
            far = socket.create_connection(self._upstream)
            self._sockets.append(far)
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self._relay, args=pair, daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                if not self.swallow.is_set():
                    sink.sendall(data)
        except OSError:
            return
