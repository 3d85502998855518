"""What every call shares: bad bytes and errors become statuses; each call is counted and logged.

A status carries ``google.rpc.BadRequest`` details where a field is to blame. An exception that is
no ``ElsError`` becomes INTERNAL with a neutral text; the log has its cause.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2

from els_service.errors import (
    ElsError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)
from els_service.wire.metrics import Metrics

_log = logging.getLogger(__name__)

_LEVELS = {"OK": logging.DEBUG, "INTERNAL": logging.ERROR}
_OURS = ("/denoise.v1.", "/inference.")


Handler = Any
"""A ``grpc.RpcMethodHandler``; its stubs cannot say of which request."""


@dataclass(frozen=True)
class _Malformed:
    """Stands for a request whose bytes are no message."""

    reason: str


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler of our services; health and reflection pass through."""

    def __init__(self, metrics: Metrics, is_model: Callable[[str], bool]) -> None:
        self._metrics, self._is_model = metrics, is_model
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._wrapped: dict[str, Handler] = {}
        self.draining = False
        """Whether new calls are refused as UNAVAILABLE."""

    async def drain(self, timeout_s: float) -> None:
        """Refuse new calls and wait until the last answer has left, or for ``timeout_s``."""
        self.draining = True
        if self._in_flight:
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), timeout_s)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Return the method's handler with the common parts around it."""
        path = str(handler_call_details.method)
        wrapped = self._wrapped.get(path)
        if wrapped is None:
            handler = await continuation(handler_call_details)
            if handler is None or not path.startswith(_OURS):
                return handler
            wrapped = self._wrapped[path] = self._wrap(path.rpartition("/")[2], handler)
        return wrapped

    def _wrap(self, method: str, handler: Handler) -> Handler:
        parse = _tolerant(handler.request_deserializer)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._streaming(method, handler.unary_stream), parse, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(method, handler.unary_unary), parse, handler.response_serializer
        )

    def _unary(self, method: str, behaviour: Any) -> Any:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            async with self._recorded(method, request, context):
                return await behaviour(request, context)

        return call

    def _streaming(self, method: str, behaviour: Any) -> Any:
        async def call(
            request: Any, context: grpc.aio.ServicerContext[Any, Any]
        ) -> AsyncIterator[Any]:
            async with self._recorded(method, request, context):
                async for answer in behaviour(request, context):
                    yield answer

        return call

    @contextlib.asynccontextmanager
    async def _recorded(self, method: str, request: Any, context: Any) -> AsyncIterator[None]:
        name = getattr(request, "model", "") or getattr(request, "model_name", "")
        # Any other name would let callers make as many label values as they please.
        model = name if isinstance(name, str) and self._is_model(name) else ""
        record = _Record(self._metrics, method, model, context, time.monotonic())
        self._in_flight += 1
        # Not when the handler ends: its answer may have a long way to go yet.
        context.add_done_callback(self._done)
        try:
            if self.draining:
                raise UnavailableError("the server is draining; ask another")
            if isinstance(request, _Malformed):
                raise InvalidArgumentError("request", "a message of this method", request.reason)
            yield
        except BaseException as error:
            await record.fail(error)
        else:
            record.end("OK")

    def _done(self, context: Any) -> None:
        self._in_flight -= 1
        if not self._in_flight:
            self._idle.set()


@dataclass(frozen=True, eq=False, slots=True)
class _Record:
    """One call under way."""

    metrics: Metrics
    method: str
    model: str
    context: Any
    since: float

    def end(self, code: str, reason: str = "", cause: Exception | None = None) -> None:
        """Count and log the call."""
        seconds = time.monotonic() - self.since
        self.metrics.answered(self.model, self.method, code, seconds)
        level = _LEVELS.get(code, logging.INFO)
        if _log.isEnabledFor(level):
            call = {
                "request_id": _request_id(self.context),
                "method": self.method,
                "model": self.model,
                "code": code,
                "seconds": round(seconds, 6),
                "peer": self.context.peer(),
                "reason": reason,
            }
            _log.log(level, "call", extra=call, exc_info=cause)

    async def fail(self, error: BaseException) -> NoReturn:
        """Count, log, and end the call with the error's status."""
        match error:
            case ElsError():
                code, text = error.code, str(error)
                self.end(code, text)
            case asyncio.CancelledError() | GeneratorExit():
                self.end("CANCELLED")
                raise error
            case Exception():
                code, text = "INTERNAL", "internal error; the server's log has the cause"
                self.end(code, text, error)
            case _:
                raise error
        details = _details(error, code, text)
        await self.context.abort(
            grpc.StatusCode[code],
            text,
            (("grpc-status-details-bin", details.SerializeToString()),),
        )
        raise AssertionError("abort always raises")


def _details(error: BaseException, code: str, text: str) -> status_pb2.Status:
    status = status_pb2.Status(code=code_pb2.Code.Value(code), message=text)
    if isinstance(error, InvalidArgumentError | ResourceExhaustedError):
        violation = error.violation
        bad_request = error_details_pb2.BadRequest(
            field_violations=[
                error_details_pb2.BadRequest.FieldViolation(
                    field=violation.field,
                    description=f"expected {violation.expected}, got {violation.got}",
                )
            ]
        )
        status.details.add().Pack(bad_request)
    return status


def _request_id(context: Any) -> str:
    """Return the caller's ``x-request-id``, or a new one."""
    for name, value in context.invocation_metadata() or ():
        if name == "x-request-id" and isinstance(value, str):
            return value[:128]
    return uuid.uuid4().hex


def _tolerant(deserializer: Any) -> Any:
    """Return a deserializer that answers garbage with ``_Malformed``: grpc would say INTERNAL."""

    def parse(data: bytes) -> Any:
        try:
            return deserializer(data)
        except DecodeError as error:
            return _Malformed(str(error) or "truncated or garbage bytes")

    return parse
