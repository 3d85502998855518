"""Health watchers that read no response: others are informed, served and ended in time."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from tests.support.metrics import value
from tests.support.models_folder import DOCUMENTS, write_models, write_slow_models
from tests.support.processes import ServerProcess, serving
from tests.support.refusals import TIMEOUT_S
from tests.support.stalling import KINDS, NO_WINDOW, stalled

from els_client import Client
from els_proto.inference import grpc_service_pb2 as oip
from els_proto.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from els_service.server.health import ALIVE

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
PORTS = ("grpc_port", "health_port")
SOON_S = 2.0
"""Ample: each takes milliseconds; held up by a watcher it would take for ever."""
LIST = vars(health_pb2)["HealthListRequest"]()
"""Of a type that the stubs do not know."""
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]
WATCHED = ("", "zeros", "not there", ALIVE, *sorted(DOCUMENTS))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("watched") / "models")


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[ServerProcess]:
    with serving("--models", root, "--threads", 1, ELS_HEALTH_PORT="0") as process:
        yield process


def channel(server: ServerProcess, port: str = "grpc_port") -> grpc.aio.Channel:
    """Return a channel that shares its connection with no other."""
    return grpc.aio.insecure_channel(f"127.0.0.1:{server.ready[port]}", OWN_CONNECTION)


def watch(channel: grpc.aio.Channel, service: str) -> Any:
    stub: Any = HealthStub(channel)
    return stub.Watch(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S)


async def check(channel: grpc.aio.Channel, service: str) -> int:
    stub: Any = HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=service)
    return int((await stub.Check(request, timeout=SOON_S)).status)


async def next_status(watching: Any) -> int:
    """Return the next status of a watcher, which must come soon."""
    return int((await asyncio.wait_for(watching.read(), SOON_S)).status)


@contextlib.asynccontextmanager
async def honest(server: ServerProcess, service: str) -> AsyncIterator[tuple[Any, Any]]:
    """Yield a watch of a service at either port."""
    async with channel(server) as one, channel(server, "health_port") as other:
        yield watch(one, service), watch(other, service)


@pytest.mark.parametrize("connections", [1, 8])
@pytest.mark.parametrize(
    "ports",
    [
        *({"grpc_port": kind} for kind in KINDS),
        {"health_port": NO_WINDOW},
        dict.fromkeys(PORTS, NO_WINDOW),
    ],
    ids=[*KINDS, "no window for probes", "no window at all"],
)
async def test_models_come_and_go_while_watchers_take_no_answer(
    server: ServerProcess, ports: dict[str, str], connections: int
) -> None:
    with ExitStack() as stack:
        for port, kind in ports.items():
            stack.enter_context(stalled(server.ready[port], WATCHED, connections, kind))
        async with channel(server) as operator, honest(server, "zeros") as watchers:
            stub: Any = GRPCInferenceServiceStub(operator)
            assert [await next_status(one) for one in watchers] == [SERVING] * 2
            unload = oip.RepositoryModelUnloadRequest(model_name="zeros")
            await stub.RepositoryModelUnload(unload, timeout=SOON_S)
            assert [await next_status(one) for one in watchers] == [NOT_SERVING] * 2
            load = oip.RepositoryModelLoadRequest(model_name="zeros")
            await stub.RepositoryModelLoad(load, timeout=SOON_S)
            assert [await next_status(one) for one in watchers] == [SERVING] * 2
            assert await check(operator, "zeros") == await check(operator, "") == SERVING


@pytest.mark.parametrize(("watches", "connections"), [(1, 1), (20, 8)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_client_is_served_while_watchers_take_no_answer(
    server: ServerProcess, kind: str, watches: int, connections: int
) -> None:
    with stalled(server.ready["grpc_port"], [""] * watches, connections, kind):
        begun = time.monotonic()
        with Client(server.target) as client:
            client.denoise(np.zeros((1, 1, 6, 5), np.float32), model="zeros", sigma=1)
        assert time.monotonic() - begun < SOON_S


def free_ports() -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in PORTS]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def test_a_server_becomes_ready_while_watchers_take_no_answer_since_it_began_to_load(
    tmp_path: Path,
) -> None:
    root = write_slow_models(tmp_path / "models", 8)
    ports = dict(zip(PORTS, free_ports(), strict=True))
    options = ("--models", root, "--threads", 1, "--port", ports["grpc_port"])
    with ExitStack() as stack:
        starting = serving(*options, ELS_HEALTH_PORT=str(ports["health_port"]))
        pool = stack.enter_context(ThreadPoolExecutor(1))
        ready = pool.submit(starting.__enter__)
        stack.callback(lambda: ready.exception() or starting.__exit__(None, None, None))
        for port in ports.values():
            stack.enter_context(stalled(port, ["", "slow-0"], 2))
        assert not ready.done()
        server = ready.result(TIMEOUT_S)
        assert server.ready["event"] == "ready"
        for name in PORTS:
            target = f"127.0.0.1:{server.ready[name]}"
            with grpc.insecure_channel(target) as one:
                stub: Any = HealthStub(one)
                answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=SOON_S)
                assert answer.status == SERVING


async def end_of(watching: Any) -> tuple[grpc.StatusCode, str]:
    """Return how a watch ends, after which it has said nothing more."""
    with contextlib.suppress(grpc.aio.AioRpcError):
        assert await asyncio.wait_for(watching.read(), SOON_S) is grpc.aio.EOF
    return await watching.code(), await watching.details()


@pytest.mark.parametrize(("ports", "connections"), [(["grpc_port"], 1), (PORTS, 8)])
async def test_sigterm_is_reported_at_once_and_ends_the_server_while_watchers_read_nothing(
    models: Path, ports: Sequence[str], connections: int
) -> None:
    settings = {"ELS_HEALTH_PORT": "0", "ELS_GRACE_S": "1.5"}
    with ExitStack() as stack:
        server = stack.enter_context(serving("--models", models, "--threads", 1, **settings))
        for port in ports:
            stack.enter_context(stalled(server.ready[port], WATCHED, connections))
        async with channel(server) as one, honest(server, "") as watchers:
            assert [await next_status(watching) for watching in watchers] == [SERVING] * 2
            assert await check(one, "") == SERVING
            begun = time.monotonic()
            server.terminate()
            assert [await next_status(watching) for watching in watchers] == [NOT_SERVING] * 2
            assert await check(one, "") == await check(one, "zeros") == NOT_SERVING
            assert await asyncio.to_thread(server.wait) == (0, "")
            # The grace, half a second for calls under way, and for tracing and metrics to close.
            assert time.monotonic() - begun < 1.5 + 0.5 + 6
            for watching in watchers:
                code, _ = await end_of(watching)
                assert code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        assert [record for record in server.records() if record["level"] == "error"] == []


async def test_a_watcher_of_an_unknown_model_learns_when_it_is_loaded(
    server: ServerProcess, root: Path
) -> None:
    async with channel(server) as operator, honest(server, "late") as watchers:
        assert [await next_status(one) for one in watchers] == [UNKNOWN] * 2
        (root / "late").mkdir()
        (root / "late" / "model.yaml").write_text(DOCUMENTS["zeros"])
        stub: Any = GRPCInferenceServiceStub(operator)
        load = oip.RepositoryModelLoadRequest(model_name="late")
        await stub.RepositoryModelLoad(load, timeout=TIMEOUT_S)
        assert [await next_status(one) for one in watchers] == [SERVING] * 2


@pytest.mark.parametrize("port", PORTS)
async def test_every_status_is_listed_and_an_unknown_service_is_not_found(
    server: ServerProcess, port: str
) -> None:
    async with channel(server, port) as one:
        stub: Any = HealthStub(one)
        statuses = (await stub.List(LIST, timeout=TIMEOUT_S)).statuses
        assert {"", ALIVE, *DOCUMENTS} <= statuses.keys()
        assert {status.status for status in statuses.values()} == {SERVING}
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await check(one, "nobody")
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        assert refused.value.details() == (
            "service: expected a service or a model of this server, got 'nobody'"
        )


async def until(holds: Callable[[], bool]) -> None:
    """Wait until metrics show it: the server notices a disconnect at no set time."""
    while not await asyncio.to_thread(holds):
        await asyncio.sleep(0.01)


async def test_watchers_are_bounded_per_connection_and_in_total_and_share_the_total(
    models: Path,
) -> None:
    bounds = {"ELS_HEALTH_WATCHERS": "6", "ELS_HEALTH_WATCHERS_PER_CONNECTION": "4"}
    with serving("--models", models, "--threads", 1, ELS_HEALTH_PORT="0", **bounds) as server:
        async with contextlib.AsyncExitStack() as stack:

            async def admitted(connection: grpc.aio.Channel) -> Any:
                watching = watch(connection, "")
                assert await next_status(watching) == SERVING
                return watching

            first, second, third, fourth, probes = [
                await stack.enter_async_context(channel(server, port))
                for port in (*["grpc_port"] * 4, "health_port")
            ]
            greedy = [await admitted(first) for _ in range(4)]
            full = "watchers: expected {}, got one more".format
            assert await end_of(watch(first, "")) == (
                EXHAUSTED,
                full("at most 4 on one connection"),
            )
            kept = [await admitted(second) for _ in range(2)]
            kept.append(await admitted(third))
            crowded = (
                EXHAUSTED,
                "watchers: replaced by a watcher of another connection; retry later",
            )
            assert await end_of(greedy.pop()) == crowded
            kept.append(await admitted(fourth))
            assert await end_of(greedy.pop()) == crowded
            # Two, two, one and one: the second has as many as it could get by pushing.
            assert await end_of(watch(second, "")) == (
                EXHAUSTED,
                full("at most 6 on all connections"),
            )
            assert await check(fourth, "") == SERVING
            await admitted(probes)
            assert value(server, "els_health_watchers", port="grpc") == 6
            assert value(server, "els_health_watchers", port="health") == 1
            for watching in (*greedy, *kept):
                watching.cancel()
            await until(lambda: value(server, "els_health_watchers", port="grpc") == 0)
