"""The HTTP port of a server: its routes, application and listener."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prometheus_client.metrics_core import Metric

from els_service.config import Settings
from els_service.engine.registry import ModelRegistry
from els_service.server.addresses import is_loopback, listening_socket, with_port
from els_service.server.security.access import AccessControl
from els_service.server.transport.handlers import SharedHandlers
from els_service.server.transport.message_memory import MessageMemory
from els_service.server.web.app import application
from els_service.server.web.bodies import BodyReader
from els_service.server.web.denoise_routes import DenoiseRoutes
from els_service.server.web.inference_routes import InferenceRoutes
from els_service.server.web.listener import Listener
from els_service.server.web.page_routes import PageRoutes
from els_service.server.web.status_report import StatusReport


@dataclass(frozen=True)
class Served:
    """Services of the HTTP port.

    Args:
        handlers: of the RPCs.
        memory: of messages.
        models: served models.
        ready: whether the server is ready.
        access: TLS and tokens of the server.
        collect: yields the metric families; thread-safe.
    """

    handlers: SharedHandlers
    memory: MessageMemory
    models: ModelRegistry
    ready: Callable[[], bool]
    access: AccessControl
    collect: Callable[[], Iterable[Metric]]


def http_listener(settings: Settings, served: Served) -> Listener:
    """Return a listener bound to the HTTP port.

    Raises:
        OSError: The port cannot be bound.
    """
    assert settings.http_port is not None
    bodies = BodyReader(served.memory, settings.limits, settings.compression)
    status = StatusReport(served.collect)
    routes = [
        *InferenceRoutes(served.handlers, bodies, served.ready).routes(),
        *DenoiseRoutes(served.handlers, bodies, served.models).routes(),
        *PageRoutes(settings.http_page, status, served.access.check_token).routes(),
    ]
    host = with_port(settings.host)
    app = application(
        routes, tokens=settings.tokens is not None, loopback=is_loopback(settings.host)
    )
    listening = listening_socket(host, settings.http_port)
    return Listener(app, listening, served.access.tls_context(), settings)
