"""Handlers that generated code creates for a servicer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.descriptor_pool import Default

from els_service.server.transport.grpc_types import Handler


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
