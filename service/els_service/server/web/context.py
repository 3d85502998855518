"""Context of a call over HTTP, as handlers of RPCs expect it from gRPC."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn
from urllib.parse import quote

import grpc
from google.rpc import code_pb2, status_pb2

from els_service.errors import DeadlineExceededError, InvalidArgumentError, UnavailableError
from els_service.server.web.errors import CallError

TIMEOUT = b"request-timeout"
"""Header of the deadline, in seconds from the arrival of the request."""
_TIMEOUT_NAME = "Request-Timeout"
_MAX_TIMEOUT_S = 2e6
_DETAILS = "grpc-status-details-bin"

Metadata = tuple[tuple[str, str], ...]
Read = Callable[["HttpContext"], Awaitable[bytes]]
"""Reads the body and returns the serialised message of the RPC."""
Write = Callable[[Any], Awaitable[None]]
"""Sends one message of a stream of responses."""


class HttpContext:
    """The part of ``grpc.aio.ServicerContext`` that handlers use, for one HTTP request.

    Args:
        scope: of ASGI.
        receive: of ASGI.
        read: called once, when the handler awaits the message.
        write: called with each message of a stream of responses.
        timeout_field: of the body, that limits the time of the call beside the header; empty if
            there is none.

    Raises:
        InvalidArgumentError: The header of the deadline is no number of seconds.
    """

    def __init__(
        self,
        scope: Any,
        receive: Any,
        read: Read,
        write: Write | None = None,
        timeout_field: str = "",
    ) -> None:
        self.scope, self.receive = scope, receive
        self.deadline_options = ", ".join(filter(None, (_TIMEOUT_NAME, timeout_field)))
        """Names of what sets the deadline, for errors."""
        self._read, self._write = read, write
        self._metadata = metadata_of(scope)
        timeout_s = _timeout_s(scope["headers"])
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._peer = peer_of(scope)
        self._task: asyncio.Task[Any] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._failure: CallError | None = None
        self._is_late = self._is_gone = False
        self.is_read = False
        """Whether the body was received completely."""

    async def run(self, call: Callable[[Any, Any], Awaitable[Any]]) -> Any:
        """Return the response of a handler; ends it if the client disconnects or its time is up.

        Raises:
            CallError: The call failed.
        """
        task = self._task = asyncio.current_task()
        assert task is not None
        timer = None
        if self._deadline is not None:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(self._deadline - time.monotonic(), self._expire)
        try:
            return await call(None, self)
        except grpc.aio.AbortError:
            raise self._failed() from None
        except asyncio.CancelledError:
            # Cancelled here, by a rejection while the body arrives, or by a server that closes.
            task.uncancel()
            raise self._failed() from None
        finally:
            if timer is not None:
                timer.cancel()
            if self._watch is not None:
                self._watch.cancel()

    async def read(self) -> bytes:
        """Return the message; from then on a disconnect cancels the call."""
        message = await self._read(self)
        self._watch = asyncio.create_task(self._watch_disconnect())
        return message

    async def write(self, message: Any) -> None:
        """Send one message of a stream of responses."""
        assert self._write is not None
        await self._write(message)

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()
    ) -> NoReturn:
        """End the call with a status.

        Raises:
            grpc.aio.AbortError: Always.
        """
        packed = dict(trailing_metadata).get(_DETAILS)
        status = status_pb2.Status(code=code_pb2.Code.Value(code.name), message=details)
        if packed is not None:
            status = status_pb2.Status.FromString(packed)
        self._failure = CallError(status, close=not self.is_read)
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        raise grpc.aio.AbortError(details)

    def peer(self) -> str:
        """Return the address of the client in gRPC's notation."""
        return self._peer

    def invocation_metadata(self) -> Metadata:
        """Return the headers, names in lower case."""
        return self._metadata

    def time_remaining(self) -> float | None:
        """Return the seconds until the deadline; None without one."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def _expire(self) -> None:
        assert self._task is not None
        self._is_late = True
        self._task.cancel()

    async def _watch_disconnect(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            continue
        assert self._task is not None
        self._is_gone = True
        self._task.cancel()

    def _failed(self) -> CallError:
        if self._failure is not None:
            return self._failure
        close = not self.is_read
        if self._is_gone:
            return CallError(status_pb2.Status(code=code_pb2.CANCELLED), close=True)
        if self._is_late:
            text = f"the time of the header {_TIMEOUT_NAME} passed before the answer"
            return CallError.of(DeadlineExceededError(text), close=close)
        text = "the server is shutting down; send the request to another replica"
        return CallError.of(UnavailableError(text), close=True)


def metadata_of(scope: Any) -> Metadata:
    """Return the headers of a request, names in lower case."""
    return tuple(
        (name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]
    )


def peer_of(scope: Any) -> str:
    """Return the client of a request in gRPC's notation, such as ``ipv4:127.0.0.1:5``."""
    if scope.get("client") is None:
        return "unix:"
    host, port = scope["client"][:2]
    if ":" in host:
        return f"ipv6:{quote(f'[{host}]')}:{port}"
    return f"ipv4:{host}:{port}"


def _timeout_s(headers: list[tuple[bytes, bytes]]) -> float | None:
    for name, value in headers:
        if name == TIMEOUT:
            text = value.decode("latin-1")
            try:
                seconds = float(text)
            except ValueError:
                seconds = math.nan
            if not 0 < seconds <= _MAX_TIMEOUT_S:
                expected = f"a number of seconds from 0 to {_MAX_TIMEOUT_S:g}"
                raise InvalidArgumentError(_TIMEOUT_NAME, expected, repr(text))
            return seconds
    return None
