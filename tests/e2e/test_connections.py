"""How long connections live and what they may carry, on a real server with short settings."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.support import frames
from tests.support.processes import ServerProcess, serving

from els_client import Client
from els_service.config import Settings
from els_service.server.security.access import channel_options

PING_S = 0.25


@pytest.fixture(scope="module")
def hasty(models: Path) -> Iterator[ServerProcess]:
    """A server that soon loses patience with silent peers; tells every call."""
    settings = {
        "ELS_KEEPALIVE_S": "0.6",
        "ELS_KEEPALIVE_TIMEOUT_S": "0.3",
        "ELS_HANDSHAKE_S": "0.3",
        "ELS_CLIENT_PING_S": str(PING_S),
        "ELS_MAX_CONCURRENT_STREAMS": "7",
    }
    with serving("--models", models, **settings) as process:
        yield process


@pytest.fixture(scope="module")
def port(hasty: ServerProcess) -> int:
    return int(hasty.ready["grpc_port"])


def test_a_connection_that_is_too_old_is_left_and_no_call_fails(models: Path) -> None:
    settings = {
        "ELS_MAX_CONNECTION_AGE_S": "0.5",
        "ELS_MAX_CONNECTION_AGE_GRACE_S": "20",
        "ELS_MAX_CONNECTION_IDLE_S": "0.2",
    }
    with serving("--models", models, "--log-level=debug", **settings) as server:
        x = np.zeros((1, 1, 6, 5), np.float32)
        with Client(server.target) as client:
            long = client.sample(model="zeros", count=32, steps=60)
            steps = [next(long).index]
            until = time.monotonic() + 2.5
            while time.monotonic() < until:
                client.denoise(x, model="zeros", sigma=1.0)
            steps += [step.index for step in long]
        assert steps == list(range(1, 61))
        calls = [one for one in server.records() if one["event"] == "call"]
        assert {one["code"] for one in calls} == {"OK"}
        assert len({one["peer"] for one in calls}) >= 3
        # GOAWAY comes twice: first a warning, then the end.
        with frames.connected(server.ready["grpc_port"], frames.BEGINNING) as idle:
            assert frames.GOAWAY in [kind for kind, _, _ in frames.received(idle)]


def test_a_peer_that_answers_no_ping_or_never_begins_is_cut_off(port: int) -> None:
    with (
        frames.connected(port, frames.BEGINNING) as silent,
        frames.connected(port) as mute,
        frames.connected(port, frames.PREFACE[:10]) as halting,
    ):
        assert parting(silent) == {b"ping_timeout"}
        for peer in (mute, halting):
            (text,) = parting(peer)
            assert b"handshake timeout" in text


def parting(peer: socket.socket) -> set[bytes]:
    """Return what the server's GOAWAY frames say, having waited until it closes."""
    return {text[8:] for kind, _, text in frames.received(peer) if kind == frames.GOAWAY}


def parting_words(port: int, *bursts: int) -> set[bytes]:
    """Return what the server's GOAWAY frames say, if any, after bursts of so many pings each."""
    with frames.connected(port, frames.BEGINNING) as peer:
        for pings in bursts:
            # The interval is what this is about: there is nothing to wait for.
            time.sleep(PING_S)
            peer.sendall(pings * frames.frame(frames.PING, payload=bytes(8)))
        peer.shutdown(socket.SHUT_WR)
        return parting(peer)


def test_pings_between_calls_are_welcome_but_not_in_too_much_haste(port: int) -> None:
    assert b"too_many_pings" not in parting_words(port, *[1] * 8)
    assert b"too_many_pings" in parting_words(port, 8)


def test_the_maximum_of_concurrent_calls_is_announced_at_connection(port: int) -> None:
    with frames.connected(port, frames.BEGINNING) as peer:
        kind, _, payload = next(frames.received(peer))
    settings = {
        int.from_bytes(payload[at : at + 2]): int.from_bytes(payload[at + 2 : at + 6])
        for at in range(0, len(payload), 6)
    }
    assert kind == frames.SETTINGS
    assert settings[frames.MAX_CONCURRENT_STREAMS] == 7


def test_the_defaults_take_a_ping_every_five_seconds_and_spare_long_trajectories() -> None:
    options = dict(channel_options(Settings()))
    assert options["grpc.http2.min_ping_interval_without_data_ms"] <= 5000
    assert options["grpc.keepalive_permit_without_calls"] == 1
    assert options["grpc.max_connection_age_grace_ms"] >= 600_000
    extreme = Settings.model_validate({"keepalive_s": 2e6, "max_connection_age_s": 1e-3})
    for chosen in (options, dict(channel_options(extreme))):
        times = [value for name, value in chosen.items() if name.endswith("_ms")]
        assert all(0 < value < 2**31 for value in times)
