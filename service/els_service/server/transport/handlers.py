"""Handlers that generated code creates for a servicer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from google.protobuf.descriptor_pool import Default

from els_service.server.transport.grpc_types import Handler


class AcceptsHandlers(Protocol):
    """A server, or what stands for one, that receives the handlers of services."""

    def add_generic_rpc_handlers(
        self, generic_rpc_handlers: Sequence[grpc.GenericRpcHandler], /
    ) -> None:
        """Add handlers."""
        ...


class SharedHandlers:
    """Receiver of handlers that adds them to a gRPC server, and keeps them for calls over HTTP.

    Args:
        server: receives the handlers.
    """

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server
        self._generic: list[grpc.GenericRpcHandler] = []

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler], /) -> None:
        """Add handlers."""
        self._server.add_generic_rpc_handlers(handlers)
        self._generic += handlers

    def find(self, details: grpc.HandlerCallDetails) -> Handler:
        """Return the handler of a call, which rejects it if its token does; None for no method."""
        found = (generic.service(details) for generic in self._generic)
        return next((handler for handler in found if handler is not None), None)


def handlers_of(
    add_to_server: Callable[[Any, Any], None], servicer: object
) -> dict[str, dict[str, Handler]]:
    """Return the handlers of a servicer by service and method.

    Args:
        add_to_server: generated function of the service.
        servicer: implements the service.
    """
    collector = _Collector()
    add_to_server(servicer, collector)
    return collector.handlers


@dataclass(frozen=True)
class _MethodOf(grpc.HandlerCallDetails):
    """Details of a call without metadata, for which generated code returns the handler."""

    method: str
    invocation_metadata: tuple[()] = ()


class _Collector:
    """Receives the handlers that generated code would add to a server.

    Code by compilers before 1.65 adds only generic handlers; that by later ones adds both.
    """

    def __init__(self) -> None:
        self.handlers: dict[str, dict[str, Handler]] = {}

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Handler]) -> None:
        self.handlers[service] = handlers

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.ServiceRpcHandler]) -> None:
        for generic in handlers:
            service = generic.service_name()
            assert service is not None
            names = (method.name for method in Default().FindServiceByName(service).methods)
            found = {name: generic.service(_MethodOf(f"/{service}/{name}")) for name in names}
            self.handlers[service] = {name: one for name, one in found.items() if one is not None}
