"""Calls of registered RPC handlers over HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc

from els_service.server.transport.handlers import SharedHandlers
from els_service.server.web.context import HttpContext, Metadata


@dataclass(frozen=True)
class _Details(grpc.HandlerCallDetails):
    """Path and headers of a call, by which its handler is chosen and its token is checked."""

    method: str
    invocation_metadata: Metadata


async def call(handlers: SharedHandlers, path: str, context: HttpContext) -> Any:
    """Return the response of a unary method; one with a stream writes to the context.

    Args:
        handlers: of services.
        path: of the method, such as ``/denoise.v1.DenoiserService/Denoise``.
        context: of the call.

    Raises:
        CallError: The call failed.
    """
    handler = handlers.find(_Details(path, context.invocation_metadata()))
    return await context.run(handler.stream_unary or handler.stream_stream)
