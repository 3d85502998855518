"""Accounting of late messages: the bytes that are charged to them."""

from __future__ import annotations

import asyncio
import socket

import pytest

from els_service.engine.budget import Budget
from els_service.errors import ElsError
from els_service.server.transport import tcp_info
from els_service.server.transport.connections import LARGE_BYTES
from els_service.server.transport.late_messages import SCAN_S
from els_service.server.transport.receiving import Receiver

MIB = 1 << 20
PEER = "ipv4:127.0.0.1:5"


class Call:
    """Call of which nothing arrives."""

    def __init__(self, peer: str = PEER, reading: Receiver | None = None) -> None:
        self._peer, self._reading = peer, reading
        self.rejected: list[ElsError] = []

    def peer(self) -> str:
        return self._peer

    async def reject(self, _: object, error: ElsError) -> None:
        self.rejected.append(error)
        if self._reading is not None:
            self._reading.end(self, 0)  # as its handler does


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes that the kernel counts, by peer."""
    counts = {PEER: 0}
    monkeypatch.setattr(tcp_info.TcpConnections, "scan", lambda _: None)
    monkeypatch.setattr(tcp_info.TcpConnections, "received", lambda _, peer: counts.get(peer))
    return counts


def receiver(capacity: int = 1 << 30) -> Receiver:
    return Receiver(Budget(capacity), 64 * MIB, 60.0)


async def scans(count: int) -> None:
    await asyncio.sleep(count * 2 * SCAN_S)


async def test_received_bytes_of_a_late_message_are_reserved_until_it_is_complete(
    received: dict[str, int],
) -> None:
    reading, call = receiver(), Call()
    reading.begin(call, None, call.reject)
    await scans(3)
    received[PEER] += 10 * MIB
    await scans(3)
    assert reading.memory.budget.held_by(PEER) == pytest.approx(10 * MIB, abs=LARGE_BYTES)
    reading.end(call, 10 * MIB)
    assert reading.memory.budget.used == 0
    reading.close()


async def test_a_late_message_is_not_charged_for_earlier_bytes_of_its_connection(
    received: dict[str, int],
) -> None:
    received[PEER] = 100 * MIB
    reading, call = receiver(), Call()
    reading.begin(call, None, call.reject)
    await scans(2)
    assert reading.memory.budget.used <= LARGE_BYTES
    reading.close()


async def test_a_failed_scan_is_followed_by_the_next(
    received: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = True

    def count(_: object, peer: str) -> int:
        if failing:
            raise OSError("too many open files")
        return received[peer]

    monkeypatch.setattr(tcp_info.TcpConnections, "received", count)
    reading, call = receiver(), Call()
    reading.begin(call, None, call.reject)
    await scans(3)
    failing = False
    received[PEER] = 5 * MIB
    await scans(3)
    received[PEER] += 5 * MIB
    await scans(3)
    assert reading.memory.budget.used > MIB
    reading.close()


async def test_sockets_without_a_byte_count_are_charged_at_most_half_of_the_budget() -> None:
    reading = receiver(256 * MIB)
    calls = [Call("unix:", reading) for _ in range(8)]
    for call in calls:
        reading.begin(call, None, call.reject)
    async with asyncio.timeout(5):
        while not any(call.rejected for call in calls):
            await scans(1)
    await scans(3)
    assert reading.memory.budget.used <= 128 * MIB
    assert sum(bool(call.rejected) for call in calls) == 6
    reading.close()


def test_a_socket_of_another_family_is_no_tcp_connection() -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as link:
        assert tcp_info._peer_of(link.fileno()) is None
