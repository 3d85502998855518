from __future__ import annotations

import math
import socket
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

from els_client import AsyncClient, Client, InvalidArgumentError, Query, UnavailableError
from els_client._channel import proxy_options

X = np.zeros((1, 1, 4, 4), np.float32)
NOWHERE = "127.0.0.1:1"


@pytest.mark.parametrize("timeout_s", [math.nan, 0.0, -1.0, math.inf, 1e9])
def test_a_deadline_that_is_none_is_refused_before_anything_is_sent(timeout_s: float) -> None:
    with pytest.raises(InvalidArgumentError, match="timeout_s: expected more than 0"):
        Client(NOWHERE, timeout_s=timeout_s)
    with Client(NOWHERE) as client:
        with pytest.raises(InvalidArgumentError, match="timeout_s"):
            client.denoise(X, model="m", sigma=1.0, timeout_s=timeout_s)
        with pytest.raises(InvalidArgumentError, match="timeout_s"):
            client.sample(model="m", timeout_s=timeout_s)
        with pytest.raises(InvalidArgumentError, match="timeout_s"):
            list(client.denoise_many([Query(X, model="m", sigma=1.0, timeout_s=timeout_s)]))


@pytest.mark.parametrize("timeout_s", [math.nan, 0.0, -1.0, 1e9])
async def test_an_async_deadline_that_is_none_is_refused_before_anything_is_sent(
    timeout_s: float,
) -> None:
    with pytest.raises(InvalidArgumentError, match="timeout_s"):
        AsyncClient(NOWHERE, timeout_s=timeout_s)
    async with AsyncClient(NOWHERE) as client:
        with pytest.raises(InvalidArgumentError, match="timeout_s"):
            await client.denoise(X, model="m", sigma=1.0, timeout_s=timeout_s)
        with pytest.raises(InvalidArgumentError, match="timeout_s"):
            client.sample(model="m", timeout_s=timeout_s)


@pytest.mark.parametrize(
    ("target", "local"),
    [
        ("127.0.0.1:50051", True),
        ("127.8.9.10:1", True),
        ("localhost:50051", True),
        ("dns:///localhost:50051", True),
        ("[::1]:50051", True),
        ("ipv4:127.0.0.1:50051", True),
        ("ipv6:[::1]:50051", True),
        ("unix:/run/els.sock", True),
        ("els.example:50051", False),
        ("10.0.0.1:50051", False),
        ("dns:///els.example:50051", False),
    ],
)
def test_loopback_and_unix_sockets_use_no_proxy(target: str, local: bool) -> None:
    assert bool(proxy_options(target)) == local


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A proxy that the environment names; takes connections and says nothing."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        listening.setblocking(False)
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{listening.getsockname()[1]}")
        for name in ("no_proxy", "grpc_proxy", "https_proxy"):
            monkeypatch.delenv(name, raising=False)
        yield listening


def test_a_call_to_loopback_does_not_reach_the_proxy(proxy: socket.socket) -> None:
    with Client(NOWHERE, timeout_s=1.0) as client, pytest.raises((UnavailableError, TimeoutError)):
        client.models()
    with pytest.raises(BlockingIOError):
        proxy.accept()
