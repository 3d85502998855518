"""Health as ``grpc.health.v1`` tells it: overall, of each service, of each model, of the process.

``""``                      SERVING once models are warm, until a drain begins: readiness
``grpc.health.v1.Health``   SERVING from the first moment on: the process answers, be there models
                            or not; what restarts a process asks for this one
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from els_service.wire.calls import SMALL_MESSAGE_BYTES, SmallMessages

ALIVE = health.SERVICE_NAME

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """What is said of the server's health, at its own port and at one for probes.

    Args:
        services: full names; each is served when the server is ready.
    """

    def __init__(self, services: Sequence[str]) -> None:
        self._services = services
        self._servicer = health.aio.HealthServicer()
        self._models: set[str] = set()
        """Models that are said to be served."""
        self._probed: grpc.aio.Server | None = None

    def register(self, server: grpc.aio.Server) -> None:
        """Answer health checks at a server."""
        small: Any = SmallMessages(server)
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, small)

    async def listen(
        self, bind: Callable[[grpc.aio.Server], int], options: Sequence[tuple[str, int]]
    ) -> int:
        """Answer health checks, and nothing else, at a port of their own; return the port."""
        small = ("grpc.max_receive_message_length", SMALL_MESSAGE_BYTES)
        server = grpc.aio.server(options=[*options, small])
        self.register(server)
        port = bind(server)
        self._probed = server
        await server.start()
        return port

    async def report(self, *, ready: bool, served: set[str], refused: Iterable[str]) -> None:
        """Say how things are now.

        Args:
            ready: whether the server as a whole is.
            served: names of models.
            refused: names of models that could not be loaded.
        """
        await self._servicer.set(ALIVE, _SERVING)
        for service in ("", *self._services):
            await self._servicer.set(service, _SERVING if ready else _NOT_SERVING)
        for name in (self._models | set(refused)) - served:
            await self._servicer.set(name, _NOT_SERVING)
        for name in served:
            await self._servicer.set(name, _SERVING)
        self._models = served

    async def leave(self, at_most_s: float) -> None:
        """Say NOT_SERVING of everything, for good."""
        # Bounded, as a watcher that takes no bytes would hold it up for ever.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(at_most_s):
                await self._servicer.enter_graceful_shutdown()

    async def close(self) -> None:
        """End the port of probes."""
        if self._probed is not None:
            await self._probed.stop(None)
