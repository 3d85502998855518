"""Incomplete messages: their memory is bounded, and other callers are admitted."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.support import frames
from tests.support.processes import ServerProcess, serving
from tests.support.refusals import TIMEOUT_S, assert_answers
from tests.support.security import TokenFile
from tests.support.unfinished import DENOISE, HEALTH, Sender

MIB = 1 << 20
BUDGET = 256 * MIB
CALLS = 12
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


def memory(process: ServerProcess, field: str) -> float:
    """Return a figure of the process's memory in MiB."""
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found
    return int(found[1]) / 1024


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    file = TokenFile(tmp_path_factory.mktemp("tokens") / "tokens.json")
    file.add("reader")
    return file


@pytest.fixture
def settings() -> dict[str, str]:
    return {"ELS_IN_FLIGHT_BYTES": str(BUDGET), "ELS_RECEIVE_S": "3", "ELS_HEALTH_PORT": "0"}


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

        def reasons() -> list[str]:
            records = server.records()
            return [one["reason"] for one in records if one.get("code") == "DEADLINE_EXCEEDED"]

        sender.run_until(lambda: len(sender.ended) == len(reasons()) == 2)
        assert reasons() == 2 * ["the message did not arrive within 0.3 s"]


def connected_from(source: int, port: int) -> socket.socket:
    """Return a connection from a port that may have others."""
    peer = socket.socket()
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        peer.setsockopt(socket.SOL_SOCKET, option, 1)
    peer.bind(("127.0.0.1", source))
    peer.settimeout(20)
    peer.connect(("127.0.0.1", port))
    return peer


def test_a_second_connection_from_the_same_port_does_not_hide_the_first(
    models: Path, settings: dict[str, str]
) -> None:
    with (
        serving(
            "--models", models, "--threads", 1, **{**settings, "ELS_RECEIVE_S": "60"}
        ) as server,
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
            sender.run_until(lambda: bool(sender.ended))
        assert memory(server, "VmHWM") - before < BUDGET / MIB + 150


@pytest.mark.parametrize("where", ["grpc_port", "health_port"])
def test_callers_without_a_token_hold_nothing_through_health_checks(
    models: Path, file: TokenFile, settings: dict[str, str], where: str
) -> None:
    with serving("--models", models, "--tokens", file.path, **settings) as server:
        before = memory(server, "VmRSS")
        with frames.connected(int(server.ready[where]), frames.BEGINNING) as peer:
            sender = Sender(peer, HEALTH, CALLS)
            sender.run_until(lambda: len(sender.ended) == CALLS)
            with grpc.insecure_channel(f"127.0.0.1:{server.ready[where]}") as probe:
                call: Any = probe.unary_unary(HEALTH)
                assert call(b"", timeout=TIMEOUT_S)
        assert memory(server, "VmHWM") - before < BUDGET / MIB + 150


def test_reflection_holds_no_more_than_the_budget_on_a_unix_socket(
    models: Path, tmp_path: Path, settings: dict[str, str]
) -> None:
    target = f"unix:{tmp_path / 'els.sock'}"
    with (
        serving("--models", models, "--threads", 1, "--host", target, **settings) as server,
        socket.socket(socket.AF_UNIX) as peer,
        grpc.insecure_channel(target) as channel,
    ):
        before = memory(server, "VmRSS")
        peer.connect(target.removeprefix("unix:"))
        peer.sendall(frames.BEGINNING)
        sender = Sender(peer, REFLECTION, CALLS)
        until = time.monotonic() + 20
        while len(sender.ended) < CALLS - 2 and time.monotonic() < until:
            sender.run(0.2)
            assert_answers(channel)
        assert memory(server, "VmHWM") - before < BUDGET / MIB + 150
        assert len(sender.ended) >= CALLS - 2
