"""Metrics of a real server in this process: serving, draining, causes of failed calls."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest
from tests.support.messages import asked, denoiser, images
from tests.support.models_folder import SHAPE, write_models

from els_service.config import Settings
from els_service.denoisers.base import Denoised, DenoiserInfo, Query
from els_service.denoisers.query_checks import check_query
from els_service.server.server import Server

WAIT_S = 30


class Held:
    """Denoiser that waits for an event."""

    def __init__(self) -> None:
        self.entered, self.go = threading.Semaphore(0), threading.Event()

    @property
    def info(self) -> DenoiserInfo:
        return DenoiserInfo(kind="held", shape=SHAPE)

    def check(self, query: Query) -> None:
        check_query(self.info, query)

    def predict_seconds(self, query: Query) -> float:
        return 0.001 * len(query)

    def denoise(self, query: Query) -> Denoised:
        self.entered.release()
        assert self.go.wait(WAIT_S)
        return Denoised(query.pixels, None)

    async def until_entered(self) -> None:
        """Wait until something is being computed."""
        assert await asyncio.to_thread(self.entered.acquire, True, WAIT_S)


@pytest.fixture
def held() -> Held:
    return Held()


@pytest.fixture
async def server(tmp_path: Path, held: Held) -> AsyncIterator[Server]:
    """A server with the held model, not yet started."""
    wiener = {"wiener": "kind: wiener\nbank: ../_banks/tiny.safetensors\n"}
    settings = Settings(
        models=write_models(tmp_path / "models", wiener),
        port=0,
        metrics_port=0,
        grace_s=0.1,
        drain_s=0.2,
        queue_s=7,
        watchdog_s=50,
    )
    server = Server(settings)
    server._engine.models.add("slow", held)
    yield server
    held.go.set()
    await server.close()


def gauge(server: Server, name: str, **labels: str) -> float:
    """Return a sample's value as it would be scraped now, 0 where there is none yet."""
    return server._metrics.registry.get_sample_value(name, labels) or 0.0


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.001)


async def test_serving_and_limits_are_exported_from_start_to_end(server: Server) -> None:
    assert gauge(server, "els_serving") == 0
    await server.start()
    assert gauge(server, "els_serving") == 1
    assert gauge(server, "els_draining_seconds") == 0
    assert gauge(server, "els_queue_limit_seconds") == 7
    assert gauge(server, "els_drain_limit_seconds") == pytest.approx(0.3)
    assert gauge(server, "els_watchdog_seconds") == 50
    await server.drain()
    assert gauge(server, "els_serving") == 0
    assert gauge(server, "els_draining_seconds") > 0


@pytest.mark.slow
async def test_a_drain_shorter_than_its_calls_shows_in_gauges_and_in_interrupted_requests(
    server: Server, held: Held
) -> None:
    target = f"127.0.0.1:{(await server.start()).grpc_port}"
    async with grpc.aio.insecure_channel(target) as channel:
        calls = [
            asyncio.ensure_future(denoiser(channel).Denoise(asked(images(i)), timeout=WAIT_S))
            for i in range(3)
        ]
        await held.until_entered()
        await until(lambda: gauge(server, "els_calls_in_flight") == 3)
        draining = asyncio.ensure_future(server.drain())
        await until(lambda: gauge(server, "els_draining_seconds") > 0.1)
        assert gauge(server, "els_serving") == 0
        assert gauge(server, "els_calls_in_flight") == 3
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await call
            assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        assert gauge(server, "els_dropped_total", model="slow", reason="interrupted") == 3
        await draining
        # What a scrape sees last, though all calls have ended: the alert is about it.
        assert gauge(server, "els_calls_in_flight") == 3


@pytest.mark.parametrize(("timeout_s", "code"), [(0.2, "DEADLINE_EXCEEDED"), (20, "CANCELLED")])
async def test_who_leaves_at_his_deadline_missed_it_and_who_leaves_before_cancelled(
    server: Server, held: Held, timeout_s: float, code: str
) -> None:
    target = f"127.0.0.1:{(await server.start()).grpc_port}"
    async with grpc.aio.insecure_channel(target) as channel:
        call = denoiser(channel).Denoise(asked(images(1)), timeout=timeout_s)
        await held.until_entered()
        if code == "CANCELLED":
            call.cancel()
        assert (await call.code()).name == code
        labels = {"model": "slow", "method": "Denoise", "code": code}
        await until(lambda: gauge(server, "els_request_seconds_count", **labels) == 1)
