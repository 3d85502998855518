"""Lifecycle of the server: bind, load, serve, drain, close.

bind ports ─► health NOT_SERVING ─► load and warm models ─► SERVING, ready ─► …
… SIGTERM ─► NOT_SERVING ─► grace ─► GOAWAY, finish calls or return resume tokens ─► exit
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

import grpc
import torch
from grpc_channelz.v1 import channelz, channelz_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from els_proto.denoise.v1 import denoise_pb2, denoise_pb2_grpc
from els_proto.inference import grpc_service_pb2, grpc_service_pb2_grpc
from els_service.config import Settings, cpu_limit
from els_service.denoisers.engines.options import EngineDefaults
from els_service.engine.device import DeviceLostError, WorkerDevice, choose_devices
from els_service.engine.engine import Engine
from els_service.errors import LoadError
from els_service.repository import ModelRepository, bundled_models
from els_service.server.addresses import address_of, bind, with_port
from els_service.server.health import ALIVE, Health
from els_service.server.security.access import (
    AccessControl,
    allow_connections,
    channel_options,
    metrics_host,
)
from els_service.server.services.denoiser import DenoiserService
from els_service.server.services.inference import InferenceService
from els_service.server.telemetry import process, tracing_maker
from els_service.server.telemetry.metrics import Gauges, Metrics
from els_service.server.telemetry.metrics_http import HttpPages
from els_service.server.transport.grpc_workarounds import make_server
from els_service.server.transport.handlers import SharedHandlers
from els_service.server.transport.interceptor import CallInterceptor
from els_service.server.transport.receiving import Receiver
from els_service.server.web import check_installed
from els_service.shards.shard import ShardOptions

if TYPE_CHECKING:
    from els_service.server.web.listener import Listener

_log = logging.getLogger(__name__)

_SERVICES = (
    denoise_pb2.DESCRIPTOR.services_by_name["DenoiserService"].full_name,
    grpc_service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name,
)
_SWITCH_S = 0.001
"""Switch interval of the interpreter: the event loop waits for it, several times per call, while
another thread renders metrics or loads a model. Python's default is 5 ms."""
_FLUSH_S = 0.5
_MAINTENANCE_S = 5.0
_CLOSE_S = 6.0
"""Time for the export of spans and for scrapes in progress."""
_REMEDY = "add models to the folder, then call RepositoryModelLoad for each, or restart"


@dataclass(frozen=True)
class Started:
    """Ports of a started server, and whether it serves a model."""

    ready: bool
    grpc_port: int
    """0 for a Unix socket."""
    metrics_port: int
    health_port: int | None
    http_port: int | None = None


def repository(settings: Settings) -> ModelRepository:
    """Return the repository of the models root in the settings, or of the bundled models."""
    engines = EngineDefaults(
        engine=settings.engine,
        precision=settings.engine_precision,
        fallback=settings.engine_fallback,
    )
    shards = ShardOptions(
        ray_address=settings.ray_address,
        stall_s=settings.shard_stall_s,
        restart_s=settings.shard_restart_s,
        load_s=settings.load_s,
    )
    return ModelRepository(settings.models or bundled_models(), engines=engines, shards=shards)


class Server:
    """Server of a process: ``start``, ``drain``, ``close``; created in its event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        check_installed(settings)
        make_tracing = tracing_maker(settings)
        self._tracing = make_tracing() if make_tracing else None
        self._metrics = Metrics(None if self._tracing is None else self._tracing.on_batch)
        devices = [WorkerDevice(name) for name in choose_devices(settings.device)]
        self._engine = Engine(self._metrics, settings.scheduling, devices)
        self._metrics.gauges = self._gauges
        self._access = AccessControl(settings)
        is_model = self._engine.models.__contains__
        limits = settings.limits
        self._receiver = Receiver(self._engine.memory, limits.max_message_bytes, settings.receive_s)
        self._calls = CallInterceptor(
            self._metrics, is_model, self._access, limits, self._receiver, self._tracing
        )
        self._background: tuple[asyncio.Task[None], ...] = ()
        self._drain_began: float | None = None
        """On the monotonic clock; None before the drain."""
        self._cut_short = 0
        """Calls that were in flight at the end of the drain, and ended UNAVAILABLE."""
        self._health = Health(_SERVICES, settings, self._receiver)
        self._pages: HttpPages | None = None
        self._http: Listener | None = None
        self._grpc = self._assemble()

    async def start(self) -> Started:
        """Bind the ports, load the models, and serve; returns when the models are warm.

        Without a loadable model the server stays NOT_SERVING until one is loaded.

        Raises:
            LoadError: A port is in use, or the models root is missing.
        """
        settings = self._settings
        models = repository(settings)
        models.check_is_there()
        coroutines = (
            process.watch_loop_lag(self._metrics.lagged),
            process.trim_heap(),
            self._maintain(),
        )
        self._background = tuple(map(asyncio.create_task, coroutines))
        grpc_port = bind(partial(self._access.bind, self._grpc), settings.host, settings.port)
        metrics_port = self._serve_metrics()
        self._report()
        http_port = self._serve_http()
        health_port = await self._serve_health()
        await self._grpc.start()
        await self._load(models)
        self._report()
        return Started(self._ready(), grpc_port, metrics_port, health_port, http_port)

    @property
    def lost(self) -> asyncio.Future[str]:
        """Future of the reason why a device can no longer compute."""
        return self._engine.lost

    async def drain(self) -> None:
        """Report NOT_SERVING, accept calls for ``grace_s``, and wait ``drain_s`` for the rest.

        Calls still in flight then end as UNAVAILABLE, trajectories with a resume token.
        """
        settings = self._settings
        self._drain_began = time.monotonic()
        self._health.drain()
        if not self.lost.done():
            await asyncio.sleep(settings.grace_s)
        self._calls.draining.set()
        goaway = asyncio.ensure_future(self._grpc.stop(settings.drain_s + 2 * _FLUSH_S))
        if self._http is not None:
            self._http.stop()
        if not await self._calls.idle(settings.drain_s):
            self._cut_short = self._calls.in_flight
            self._engine.interrupt(
                "the server is shutting down; send the request to another replica"
            )
            await self._calls.idle(_FLUSH_S)
        # Health watchers remain until they are cancelled.
        await self._grpc.stop(_FLUSH_S)
        await goaway

    async def close(self) -> None:
        """Cancel all calls; stop all threads and listeners."""
        await self._grpc.stop(None)
        if self._http is not None:
            await self._http.close()
        await self._health.close()
        self._receiver.close()
        self._engine.close()
        for task in self._background:
            task.cancel()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)
        if self._pages is not None:
            await asyncio.to_thread(self._pages.close)

    def _assemble(self) -> grpc.aio.Server:
        limits = self._settings.limits
        server = make_server(
            [
                ("grpc.max_receive_message_length", limits.max_message_bytes),
                ("grpc.max_send_message_length", limits.max_message_bytes),
                *channel_options(self._settings),
            ]
        )
        self._handlers = shared = SharedHandlers(server)
        denoiser = DenoiserService(self._engine, limits, self._calls.draining)
        inference = InferenceService(self._engine, limits, self._ready, self._report)
        self._calls.register(
            denoise_pb2_grpc.add_DenoiserServiceServicer_to_server, denoiser, shared
        )
        self._calls.register(
            grpc_service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server, inference, shared
        )
        self._health.register(server)
        if self._settings.reflection:
            described = (*_SERVICES, ALIVE, reflection.SERVICE_NAME)
            self._calls.admit(
                reflection_pb2_grpc.add_ServerReflectionServicer_to_server,
                reflection.aio.ReflectionServicer(described),
                server,
            )
        if self._settings.channelz:
            self._calls.admit(
                channelz_pb2_grpc.add_ChannelzServicer_to_server,
                channelz.aio.ChannelzServicer(),
                server,
            )
        return server

    def _gauges(self) -> Gauges:
        """Yield the gauges of the engine and of the server; thread-safe."""
        settings, since = self._settings, self._drain_began
        yield from self._engine.gauges()
        for name, stale_s in self._access.stale().items():
            yield "els_reloaded_file_stale_seconds", {"file": name}, stale_s
        yield from self._health.gauges()
        # The last scrape may come between the calls' end and the exit: they still count.
        yield "els_calls_in_flight", {}, max(self._calls.in_flight, self._cut_short)
        yield "els_drain_limit_seconds", {}, settings.grace_s + settings.drain_s
        yield "els_draining_seconds", {}, 0.0 if since is None else time.monotonic() - since
        yield "els_queue_limit_seconds", {}, settings.queue_s
        yield "els_serving", {}, not self._why_not_ready()
        yield "els_watchdog_seconds", {}, settings.watchdog_s

    def _ready(self) -> bool:
        models = self._engine.models
        return bool(models.newest()) and not (models.starting or self._calls.draining.is_set())

    def _why_not_ready(self) -> str:
        """Return why the server is not ready; empty if it is. Thread-safe."""
        if self._drain_began is not None:
            return "the server is draining"
        if self._engine.models.starting:
            return "models are being loaded"
        return "" if self._ready() else "no model is served"

    async def _maintain(self) -> None:
        """End the series of unloaded models, and check the reloaded files, periodically."""
        models = self._engine.models
        while True:
            await asyncio.sleep(_MAINTENANCE_S)
            self._metrics.retire(models.names())
            # An invalid file must be logged without calls or scrapes, too.
            await asyncio.to_thread(self._access.stale)

    def _report(self) -> None:
        models = self._engine.models
        served = {version.model for version in models.newest()}
        self._health.report(ready=self._ready(), served=served, refused=models.faults)

    async def _load(self, models: ModelRepository) -> None:
        """Load the models; if none can be loaded, log it and continue: one may be loaded later."""
        _log.info("loading models", extra={"models": str(models.root)})
        reason = "the folder has no model"
        try:
            await self._engine.models.load_all(models)
        except LoadError as error:
            reason = str(error)
        if not self._engine.models.newest():
            faults = "; ".join(map(str, self._engine.models.faults.values()))
            extra = {"models": str(models.root), "reason": faults or reason, "remedy": _REMEDY}
            _log.error("no model is served", extra=extra)

    async def _serve_health(self) -> int | None:
        settings = self._settings
        if settings.health_port is None:
            return None
        address = with_port(settings.host), settings.health_port
        return await self._health.listen(
            lambda server: bind(server.add_insecure_port, *address), channel_options(settings)
        )

    def _serve_http(self) -> int | None:
        settings = self._settings
        if settings.http_port is None:
            return None
        # Imports the extra.
        from els_service.server.web.port import Served, http_listener

        served = Served(
            self._handlers,
            self._receiver.memory,
            self._engine.models,
            lambda: not self._why_not_ready(),
            self._access,
            self._metrics.collect,
        )
        try:
            self._http = http_listener(settings, served)
        except OSError as error:
            address = address_of(with_port(settings.host), settings.http_port)
            raise LoadError(address, f"cannot serve HTTP: {error.strerror}") from error
        self._http.start()
        return self._http.port

    def _serve_metrics(self) -> int:
        host, port = metrics_host(self._settings), self._settings.metrics_port
        try:
            self._pages = HttpPages(self._metrics.registry, self._why_not_ready, host, port)
        except OSError as error:
            raise LoadError(
                address_of(host, port), f"cannot serve metrics: {error.strerror}"
            ) from error
        return self._pages.port


def stop_at_most_s(settings: Settings) -> float:
    """Return the maximum time from SIGTERM to exit, not counting a batch in progress.

    It is the sum of grace, drain, sending the last statuses, and closing listeners and exporters.
    """
    return settings.grace_s + settings.drain_s + 2 * _FLUSH_S + _CLOSE_S


async def serve(settings: Settings, ready: Callable[[Started], None]) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    Args:
        settings: of the server.
        ready: called once, after the models have been loaded.

    Raises:
        LoadError: As of ``Server.start``.
        DeviceLostError: A device can no longer compute; the server has drained.
    """
    process.limit_arenas()
    torch.set_num_threads(settings.threads or cpu_limit())
    sys.setswitchinterval(_SWITCH_S)
    allow_connections()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = Server(settings)
    starting, stopping = loop.create_task(server.start()), loop.create_task(stop.wait())
    try:
        end_events = stopping, server.lost
        await asyncio.wait((starting, *end_events), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            started = starting.result()
            if started.ready:
                _log.info("serving", extra=asdict(started))
            # Objects created so far live until the end: exclude them from garbage collection.
            gc.collect()
            gc.freeze()
            ready(started)
            await asyncio.wait(end_events, return_when=asyncio.FIRST_COMPLETED)
        _log.info("draining", extra={"at_most_s": settings.drain_s})
        await server.drain()
        if server.lost.done():
            raise DeviceLostError(server.lost.result())
    finally:
        gc.unfreeze()
        starting.cancel()
        stopping.cancel()
        await server.close()
