"""Writing of streamed responses."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc

from els_service.server.telemetry.metrics import Method
from els_service.server.transport.call_context import check_cancelled
from els_service.server.transport.grpc_types import Context, Response


async def write_all(responses: Any, method: Method, context: Context) -> None:
    """Write and count the responses of an async generator, then close it.

    gRPC would leave the generator of a cancelled call to the garbage collector, which may finish
    it after the call was freed; reading the peer of a freed call crashes the process.

    Raises:
        CancelledError: The client has disconnected or cancelled.
    """
    async with contextlib.aclosing(responses):
        async for response in responses:
            await write(context, response)
            method.sent += 1


async def write(context: Context, response: Response) -> None:
    """Write one response.

    Raises:
        CancelledError: The client has disconnected or cancelled.
        grpc.aio.AbortError: The call was rejected in the meantime.
    """
    try:
        await context.write(response)
    except grpc.aio.AbortError:
        raise
    except grpc.aio.BaseError as error:
        raise asyncio.CancelledError("the client has disconnected") from error
    check_cancelled()


def response_bytes(response: Response) -> int:
    """Return the serialised size of a response."""
    size: int = len(response) if type(response) is bytes else response.ByteSize()
    return size
