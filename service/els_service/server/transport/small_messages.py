"""Bounded messages of health, reflection and channelz, whose requests are always small."""

from __future__ import annotations

import contextlib
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from els_service.errors import ElsError
from els_service.server.requests.message_structure import MessageStructureError, inflated
from els_service.server.transport.call_context import token_name
from els_service.server.transport.grpc_types import Context, Handler
from els_service.server.transport.receiving import Receiver, RequestStream
from els_service.server.transport.responses import write

SMALL_MESSAGE_BYTES = 4096
"""Maximum size of a message, decompressed."""
SMALL_MESSAGE_S = 2.0
"""Maximum time that a message may take to arrive."""
UNREADABLE = "?"
"""Value of the first field in place of a message that is too large or unparsable."""


class SmallMessages:
    """Wrapper of a server that bounds the messages of the services added to it.

    Args:
        server: receives the handlers.
        receiver: reads their messages.
    """

    def __init__(self, server: grpc.aio.Server, receiver: Receiver) -> None:
        self._server, self._receiver = server, receiver

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Handler]) -> None:
        """Add the handlers of a service; called by generated code."""
        small = {
            name: small_messages(handler, self._receiver) for name, handler in handlers.items()
        }
        generic = grpc.method_handlers_generic_handler(service, small)
        self._server.add_generic_rpc_handlers((generic,))
        # Registered methods have an accept queue of their own: flooding it blocks no other method.
        self._server.add_registered_method_handlers(service, small)

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Ignore handlers that ``add_registered_method_handlers`` received already."""


def small_messages(handler: Handler, receiver: Receiver) -> Handler:
    """Return a handler that rejects messages over ``SMALL_MESSAGE_BYTES``, decompressed."""
    deserializer = handler.request_deserializer

    def parse(data: bytes | None) -> Any:
        try:
            message = inflated(data or b"", SMALL_MESSAGE_BYTES)
            if len(message) > SMALL_MESSAGE_BYTES:
                raise MessageStructureError(f"{len(message)} bytes")
            return deserializer(message)
        except (DecodeError, MessageStructureError):
            # Names no service, so the response is that of an unknown one.
            return deserializer(b"\x0a\x01" + UNREADABLE.encode())

    async def request_of(context: Context) -> Any:
        return parse(await receiver.read(context, token_name(), _abort, SMALL_MESSAGE_S))

    if handler.request_streaming:

        async def stream_stream(_: object, context: Context) -> None:
            limit_s = receiver.receive_s
            requests = RequestStream(
                receiver, context, token_name(), _abort, parse, _too_large, limit_s
            )
            try:
                responses = handler.stream_stream(requests, context)
                async with contextlib.aclosing(responses):
                    async for response in responses:
                        await write(context, response)
            finally:
                requests.close()

        return grpc.stream_stream_rpc_method_handler(
            stream_stream, None, handler.response_serializer
        )
    if handler.response_streaming:

        async def unary_stream(_: object, context: Context) -> None:
            await handler.unary_stream(await request_of(context), context)

        return grpc.stream_stream_rpc_method_handler(
            unary_stream, None, handler.response_serializer
        )

    async def unary_unary(_: object, context: Context) -> Any:
        return await handler.unary_unary(await request_of(context), context)

    return grpc.stream_unary_rpc_method_handler(unary_unary, None, handler.response_serializer)


async def _too_large(_: str, data: bytes) -> bytes:
    """Return gzip data that are too large as they are: ``parse`` rejects them."""
    return data


async def _abort(context: Context, error: ElsError) -> None:
    await context.abort(grpc.StatusCode[error.code], str(error))
