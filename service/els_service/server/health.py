"""Health after ``grpc.health.v1``: overall, of each service, of each model, of the process.

``""``                      readiness: SERVING once models are warm, until the drain
``grpc.health.v1.Health``   liveness: SERVING while the process runs, with or without models
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from els_service.config import Settings
from els_service.server.services.health import HealthService, Status
from els_service.server.services.health_watchers import Watchers
from els_service.server.transport.grpc_workarounds import make_server
from els_service.server.transport.receiving import Receiver
from els_service.server.transport.small_messages import SMALL_MESSAGE_BYTES, SmallMessages

ALIVE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """Health of the server and its models, at the gRPC port and at the health port.

    Args:
        services: full names; SERVING while the server is ready.
        settings: of the server; limits of watchers apply to each port.
        receiver: reads the messages of health checks.
    """

    def __init__(self, services: Sequence[str], settings: Settings, receiver: Receiver) -> None:
        self._services, self._settings, self._receiver = services, settings, receiver
        self._statuses: dict[str, Status] = {}
        self._watchers: dict[str, Watchers] = {}
        """By port: watchers at one do not affect those at the other."""
        self._served: set[str] = set()
        """Names of models that are SERVING."""
        self._draining = False
        self._health_server: grpc.aio.Server | None = None

    def register(self, server: grpc.aio.Server, port: str = "grpc") -> None:
        """Add the health service to a server; ``port`` is its name in metrics."""
        settings = self._settings
        watchers = Watchers(settings.health_watchers, settings.health_watchers_per_connection)
        self._watchers[port] = watchers
        servicer = HealthService(self._statuses, watchers)
        small: Any = SmallMessages(server, self._receiver)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, small)

    async def listen(
        self, bind: Callable[[grpc.aio.Server], int], options: Sequence[tuple[str, int]]
    ) -> int:
        """Serve health checks at a port of their own, and return the port."""
        small = ("grpc.max_receive_message_length", SMALL_MESSAGE_BYTES)
        server = make_server([*options, small])
        self.register(server, "health")
        port = bind(server)
        self._health_server = server
        await server.start()
        return port

    def report(self, *, ready: bool, served: set[str], refused: Iterable[str]) -> None:
        """Set all statuses; does nothing after ``drain``.

        Args:
            ready: whether the server is ready.
            served: names of the served models.
            refused: names of models that failed to load.
        """
        if self._draining:
            return
        unserved = (self._served | set(refused)) - served
        self._served = served
        self._set({ALIVE: _SERVING})
        self._set(dict.fromkeys(("", *self._services), _SERVING if ready else _NOT_SERVING))
        self._set({**dict.fromkeys(unserved, _NOT_SERVING), **dict.fromkeys(served, _SERVING)})

    def drain(self) -> None:
        """Set all statuses to NOT_SERVING permanently."""
        self._draining = True
        self._set(dict.fromkeys(self._statuses, _NOT_SERVING))

    def gauges(self) -> Iterator[tuple[str, dict[str, str], float]]:
        """Yield the numbers of watchers at each port, as metrics."""
        for port, watchers in self._watchers.items():
            yield "els_health_watchers", {"port": port}, watchers.live
            yield "els_health_watchers_stalled", {"port": port}, watchers.stalled

    async def close(self) -> None:
        """Close the health port."""
        if self._health_server is not None:
            await self._health_server.stop(None)

    def _set(self, statuses: Mapping[str, Status]) -> None:
        for service, status in statuses.items():
            if self._statuses.get(service) != status:
                self._statuses[service] = status
                for watchers in self._watchers.values():
                    watchers.wake(service)
