"""Proxies of the environment: never for this machine, kept for others, named where they fail."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.fake_server import FakeDenoiser, served
from tests.support.proxies import Proxy, proxying

from els_client import AsyncClient, Client, DeadlineExceededError, UnavailableError
from els_client._route import Route

VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy")
URL, SHOWN = "http://user:secret@proxy.example:3128", "http://proxy.example:3128"
Kind = type[Client] | type[AsyncClient]


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def refusing() -> Iterator[Proxy]:
    with proxying() as proxy:
        yield proxy


async def models(kind: Kind, target: str, **options: Any) -> list[Any]:
    """Return the models that a fresh client sees."""
    client = kind(target, **options)
    try:
        found = client.models()
        return found if isinstance(found, list) else await found
    finally:
        if isinstance(client, Client):
            client.close()
        else:
            await client.close()


@pytest.mark.parametrize(
    ("target", "local"),
    [
        ("127.0.0.1:50051", True),
        ("127.8.9.1:50051", True),
        ("localhost", True),
        ("LocalHost.:50051", True),
        ("els.localhost:50051", True),
        ("[::1]:50051", True),
        ("::1", True),
        ("[::ffff:127.0.0.1]:50051", True),
        ("0.0.0.0:50051", True),
        ("dns:localhost:50051", True),
        ("dns:///localhost:50051", True),
        ("dns://8.8.8.8/localhost:50051", True),
        ("ipv4:127.0.0.1:1,127.0.0.1:2", True),
        ("ipv6:[::1]:1", True),
        ("ipv6:%5B::1%5D:1", True),
        ("unix:/run/els.sock", True),
        ("unix:///run/els.sock", True),
        ("unix-abstract:els", True),
        ("els.example:50051", False),
        ("localhost.example:50051", False),
        ("10.0.0.1:50051", False),
        ("dns://127.0.0.1/els.example:50051", False),
        ("ipv4:127.0.0.1:1,10.0.0.1:2", False),
        ("[2001:db8::1]:50051", False),
        ("xds:///els", False),
    ],
)
def test_loopback_and_sockets_are_this_machine_s_in_every_syntax_of_a_target(
    target: str, local: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", URL)
    route = Route.to(target)
    assert (route.is_local, route.proxy) == (local, "" if local else SHOWN)


@pytest.mark.parametrize(
    ("environment", "proxy", "variable"),
    [
        ({}, "", ""),
        ({"http_proxy": URL}, SHOWN, "http_proxy"),
        ({"http_proxy": "http://x:1", "https_proxy": URL}, SHOWN, "https_proxy"),
        ({"https_proxy": "http://x:1", "grpc_proxy": URL}, SHOWN, "grpc_proxy"),
        # The first that is set counts, though it be of no use.
        ({"http_proxy": URL, "https_proxy": ""}, "", ""),
        ({"http_proxy": URL, "https_proxy": "socks5://x:1"}, "", ""),
        ({"http_proxy": "proxy.example:3128"}, "", ""),
        ({"http_proxy": URL, "no_proxy": "x, EXAMPLE"}, "", ""),
        ({"http_proxy": URL, "no_proxy": "*"}, SHOWN, "http_proxy"),
        ({"http_proxy": URL, "no_proxy": "example", "no_grpc_proxy": ""}, SHOWN, "http_proxy"),
        ({"http_proxy": URL, "no_grpc_proxy": "els.example"}, "", ""),
    ],
)
def test_a_proxy_is_chosen_as_grpc_chooses_it_and_its_password_is_not_kept(
    environment: dict[str, str], proxy: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    route = Route.to("els.example:50051")
    assert (route.proxy, route.variable if proxy else "") == (proxy, variable)
    assert "secret" not in repr(route)


def test_a_network_of_no_proxy_exempts_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", URL)
    monkeypatch.setenv("no_proxy", "10.0.0.0/8,fd00::/8")
    found = [Route.to(target).proxy for target in ("10.1.2.3:1", "[fd00::1]:1", "11.1.2.3:1")]
    assert found == ["", "", SHOWN]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "ipv4:127.0.0.1", "dns:///127.0.0.1"])
async def test_calls_for_loopback_pass_no_proxy(
    kind: Kind, host: str, target: str, refusing: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES[:3]:
        monkeypatch.setenv(name, refusing.url)
    port = target.rpartition(":")[2]
    assert await models(kind, f"{host}:{port}")
    assert refusing.asked == []


async def test_calls_for_others_go_through_the_proxy_to_their_server(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(FakeDenoiser()) as address, proxying(int(address.rpartition(":")[2])) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        assert await models(kind, "els.invalid:50051")
        assert proxy.asked == ["els.invalid:50051"]


@pytest.mark.slow
async def test_an_error_names_the_proxy_that_refused_and_not_its_password(
    kind: Kind, refusing: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", refusing.url)
    with pytest.raises(UnavailableError) as caught:
        await models(kind, "els.invalid:50051")
    text = str(caught.value)
    assert f"through the proxy http://{refusing.address} of https_proxy" in text
    assert "no_proxy" in text
    assert "403" in text
    assert "secret" not in text
    assert "running" not in text


async def test_a_proxy_that_says_nothing_is_named_where_the_deadline_passes(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("http_proxy", f"http://{address}")
        with pytest.raises(DeadlineExceededError, match=f"through the proxy http://{address} of"):
            await models(kind, "els.invalid:50051", timeout_s=0.2)


@pytest.mark.slow
async def test_where_nothing_listens_the_error_asks_whether_the_server_runs(
    kind: Kind, tmp_path: Path
) -> None:
    # Each way once, as either takes seconds of retries.
    target = "127.0.0.1:1" if kind is Client else f"unix:{tmp_path}/els.sock"
    with pytest.raises(UnavailableError, match=r"Is els-server running\?") as caught:
        await models(kind, target)
    assert f"nothing listens at {target}" in str(caught.value)


def test_a_server_that_answers_that_it_is_away_is_not_said_to_be_gone() -> None:
    for text in ("draining", "models are still being loaded", "Connection reset by peer"):
        assert Route.to("127.0.0.1:1").explained("UNAVAILABLE", text) == text
    assert Route.to("127.0.0.1:1").explained("INTERNAL", "Connection refused") == (
        "Connection refused"
    )
