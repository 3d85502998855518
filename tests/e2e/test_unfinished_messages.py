"""Messages that do not end: what they hold is bounded, and others get in."""

from __future__ import annotations

import re
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.e2e import frames
from tests.e2e.processes import ServerProcess, serving
from tests.e2e.refusals import TIMEOUT_S, assert_answers
from tests.e2e.security import TokenFile

MIB = 1 << 20
DENOISE = "/denoise.v1.DenoiserService/Denoise"
HEALTH = "/grpc.health.v1.Health/Check"
BUDGET = 256 * MIB
ANNOUNCED = 60 * MIB
CALLS = 12


def memory(process: ServerProcess, field: str) -> float:
    """Return a figure of the process's memory in MiB."""
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found
    return int(found[1]) / 1024


class Sender:
    """Peer that begins calls on one connection, and sends all of their messages but the end.

    Args:
        peer: connected.
        path: of the method.
        calls: how many at once.
        announced: size of each message in its head; None for no head.
    """

    def __init__(
        self, peer: socket.socket, path: str, calls: int, announced: int | None = ANNOUNCED
    ) -> None:
        self._peer = peer
        self.room = 65535
        """Of the connection, in bytes."""
        self.rooms = dict.fromkeys(range(1, 2 * calls, 2), 65535)
        self.sent = dict.fromkeys(self.rooms, 0)
        self.ended: dict[int, bytes] = {}
        """Stream → the headers that ended it."""
        self._rest = b""
        head = b"" if announced is None else b"\0" + struct.pack(">I", announced)
        for stream in self.rooms:
            block = frames.headers(path)
            self._send(frames.HEADERS, stream, block, frames.END_HEADERS)
            if head:
                self._send(frames.DATA, stream, head)
            self.rooms[stream] -= len(head)
            self.room -= len(head)

    def run(self, seconds: float) -> None:
        """Send for some seconds, or until nothing may be sent and nothing comes."""
        until = time.monotonic() + seconds
        chunk = bytes(16384)
        while time.monotonic() < until:
            for stream, room in self.rooms.items():
                size = min(room, self.room, 16384, ANNOUNCED - 1 - self.sent[stream])
                if size > 0 and stream not in self.ended:
                    self._send(frames.DATA, stream, chunk[:size])
                    self.rooms[stream] -= size
                    self.room -= size
                    self.sent[stream] += size
            self._take()

    def _send(self, kind: int, stream: int, payload: bytes, flags: int = 0) -> None:
        self._peer.sendall(frames.frame(kind, stream=stream, payload=payload, flags=flags))

    def _take(self) -> None:
        self._peer.settimeout(0.001)
        with suppress(TimeoutError, BlockingIOError):
            self._rest += self._peer.recv(1 << 16)
        self._peer.settimeout(20)
        while len(self._rest) >= 9:
            size = int.from_bytes(self._rest[:3])
            if len(self._rest) < 9 + size:
                return
            kind, flags = self._rest[3], self._rest[4]
            stream = int.from_bytes(self._rest[5:9])
            payload, self._rest = self._rest[9 : 9 + size], self._rest[9 + size :]
            self._frame(kind, flags, stream, payload)

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == 8:  # WINDOW_UPDATE
            more = int.from_bytes(payload)
            if stream:
                self.rooms[stream] += more
            else:
                self.room += more
        elif kind == frames.SETTINGS and not flags & frames.ACK:
            for at in range(0, len(payload), 6):
                name, value = struct.unpack(">HI", payload[at : at + 6])
                if name == 4:  # INITIAL_WINDOW_SIZE
                    for other in self.rooms:
                        self.rooms[other] += value - 65535
            self._peer.sendall(frames.frame(frames.SETTINGS, flags=frames.ACK))
        elif kind == frames.PING and not flags & frames.ACK:
            self._peer.sendall(frames.frame(frames.PING, flags=frames.ACK, payload=payload))
        elif (kind == frames.HEADERS and flags & frames.END_STREAM) or kind == frames.RST_STREAM:
            self.ended.setdefault(stream, payload)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    file = TokenFile(tmp_path_factory.mktemp("tokens") / "tokens.json")
    file.add("reader")
    return file


@pytest.fixture
def settings() -> dict[str, str]:
    return {"ELS_IN_FLIGHT_BYTES": str(BUDGET), "ELS_RECEIVE_S": "6", "ELS_HEALTH_PORT": "0"}


@pytest.fixture
def tight(models: Path, settings: dict[str, str]) -> Iterator[ServerProcess]:
    """A server of which all callers together may hold 256 MiB."""
    with serving("--models", models, "--threads", 1, **settings) as process:
        yield process


def port_of(server: ServerProcess) -> int:
    return int(server.ready["grpc_port"])


@pytest.mark.parametrize("connections", [1, 6])
def test_messages_that_do_not_end_hold_no_more_than_the_budget(
    tight: ServerProcess, connections: int
) -> None:
    before = memory(tight, "VmRSS")
    with ExitStack() as stack:
        channel = stack.enter_context(grpc.insecure_channel(tight.target))
        assert_answers(channel)
        senders = []
        for _ in range(connections):
            peer = stack.enter_context(frames.connected(port_of(tight), frames.BEGINNING))
            senders.append(Sender(peer, DENOISE, CALLS // connections + 1))
        until = time.monotonic() + 20
        while not any(sender.ended for sender in senders) and time.monotonic() < until:
            for sender in senders:
                sender.run(0.2)
            assert_answers(channel)
        assert any(sender.ended for sender in senders)
        for sender in senders:
            sender.run(0.3)
        # 40 such calls took 2.4 GiB.
        assert memory(tight, "VmHWM") - before < BUDGET / MIB + 150
    with grpc.insecure_channel(tight.target) as channel:
        assert_answers(channel)


def test_a_message_that_does_not_arrive_in_time_ends_its_call(
    models: Path, settings: dict[str, str]
) -> None:
    with (
        serving("--models", models, **{**settings, "ELS_RECEIVE_S": "0.3"}) as server,
        frames.connected(port_of(server), frames.BEGINNING) as peer,
    ):
        sender = Sender(peer, DENOISE, 2)
        sender.run(1.5)
        assert set(sender.ended) == {1, 3}
        records = [one for one in server.records() if one.get("code") == "DEADLINE_EXCEEDED"]
        assert [one["reason"] for one in records] == 2 * ["the message did not arrive within 0.3 s"]


def connected_from(source: int, port: int) -> socket.socket:
    """Return a connection from a port that may have others."""
    peer = socket.socket()
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        peer.setsockopt(socket.SOL_SOCKET, option, 1)
    peer.bind(("127.0.0.1", source))
    peer.settimeout(20)
    peer.connect(("127.0.0.1", port))
    return peer


def test_a_second_connection_from_the_same_port_hides_nothing(
    models: Path, settings: dict[str, str]
) -> None:
    with (
        serving("--models", models, "--threads", 1, **settings) as server,
        socket.create_server(("127.0.0.1", 0)) as free,
    ):
        source = free.getsockname()[1]
        free.close()
        before = memory(server, "VmRSS")
        with (
            connected_from(source, int(server.ready["health_port"])),
            connected_from(source, port_of(server)) as peer,
        ):
            peer.sendall(frames.BEGINNING)
            sender = Sender(peer, DENOISE, CALLS)
            sender.run(4)
            assert sender.ended
        assert memory(server, "VmHWM") - before < BUDGET / MIB + 150


@pytest.mark.parametrize("where", ["grpc_port", "health_port"])
def test_callers_without_a_token_hold_nothing_through_health_checks(
    models: Path, file: TokenFile, settings: dict[str, str], where: str
) -> None:
    with serving("--models", models, "--tokens", file.path, **settings) as server:
        before = memory(server, "VmRSS")
        with frames.connected(int(server.ready[where]), frames.BEGINNING) as peer:
            sender = Sender(peer, HEALTH, CALLS)
            sender.run(4)
            assert len(sender.ended) == CALLS
            with grpc.insecure_channel(f"127.0.0.1:{server.ready[where]}") as probe:
                call: Any = probe.unary_unary(HEALTH)
                assert call(b"", timeout=TIMEOUT_S)
        assert memory(server, "VmHWM") - before < BUDGET / MIB + 150
