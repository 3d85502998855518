"""Interceptor of calls: parses, counts, logs and traces them, and maps exceptions to statuses."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import grpc
from google.rpc import code_pb2

from els_service.config import Limits
from els_service.engine.budget import Holding
from els_service.errors import ElsError, UnavailableError
from els_service.logs import CALL
from els_service.server.requests.message_structure import is_large_gzip
from els_service.server.telemetry.metrics import Method, Metrics
from els_service.server.transport.call_context import (
    CallRecord,
    caller_of,
    check_cancelled,
    token_name,
)
from els_service.server.transport.connections import LARGE_BYTES
from els_service.server.transport.grpc_types import Context, Handler, Reject
from els_service.server.transport.handlers import AcceptsHandlers, handlers_of
from els_service.server.transport.receiving import (
    Decompressor,
    Malformed,
    Parse,
    Receiver,
    RequestStream,
    check_message,
    parser,
    serializer,
)
from els_service.server.transport.responses import response_bytes, write_all
from els_service.server.transport.small_messages import small_messages
from els_service.server.transport.status import DEADLINE_OPTIONS, drop_tracebacks, status_of

if TYPE_CHECKING:
    from els_service.server.telemetry.tracing import Tracing

_log = logging.getLogger(__name__)

_LEVELS = {"OK": logging.DEBUG, "INTERNAL": logging.ERROR}
"""Status code → level of its log record; INFO for others."""
_MODEL_FIELDS = ("model", "model_name", "name")
"""Fields of requests that name the model."""
_KINDS = {
    (False, False): "unary",
    (True, False): "client_stream",
    (False, True): "server_stream",
    (True, True): "bidi_stream",
}
"""(requests, responses) are streams → ``grpc_type``."""
_NO_VARIABLES = contextvars.Context()
"""Saves a copy of the current context at every call."""


class Access(Protocol):
    """Check of which caller may call which method."""

    def protected(
        self,
        service: str,
        handlers: Mapping[str, Handler],
        reject: Callable[[str, ElsError, Any], Awaitable[NoReturn]],
    ) -> grpc.GenericRpcHandler:
        """Return a service's handlers, by method, behind the check."""


class CallInterceptor:
    """Wrapper of the handlers of services, applied once when a service is registered.

    A ``grpc.aio.ServerInterceptor`` would add a tenth to the time of each call.

    Args:
        metrics: count the calls.
        is_model: whether a name is that of a model; other names are no metric labels, as clients
            could create any number of them.
        access: checks callers.
        limits: of requests.
        receiver: reads messages.
        tracing: creates spans; None if tracing is off.

    Attributes:
        draining: set to reject new calls as UNAVAILABLE and to end streams.
    """

    def __init__(
        self,
        metrics: Metrics,
        is_model: Callable[[str], bool],
        access: Access,
        limits: Limits,
        receiver: Receiver,
        tracing: Tracing | None = None,
    ) -> None:
        self._metrics, self._is_model, self._limits = metrics, is_model, limits
        self._receiver = receiver
        self._access, self._tracing = access, tracing
        self._in_flight = 0

        def done(_: object) -> None:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

        # One object for all calls: a closure per call costs time.
        self._done = done
        self._idle = asyncio.Event()
        self.draining = asyncio.Event()

    def register(
        self, add_to_server: Callable[[Any, Any], None], servicer: object, server: AcceptsHandlers
    ) -> None:
        """Add a servicer, which may return messages or serialised messages, to a server.

        Args:
            add_to_server: generated function of the service.
            servicer: implements the service.
            server: receives the handlers.
        """
        for service, handlers in handlers_of(add_to_server, servicer).items():
            methods = {
                name: self._method(service, name, handler) for name, handler in handlers.items()
            }
            wrapped = {
                name: self._wrap(methods[name], handler) for name, handler in handlers.items()
            }
            self._add(service, wrapped, methods, server)

    def admit(
        self, add_to_server: Callable[[Any, Any], None], servicer: object, server: grpc.aio.Server
    ) -> None:
        """Add a servicer behind the access check; only rejected calls are counted and logged."""
        for service, handlers in handlers_of(add_to_server, servicer).items():
            self._add(service, handlers, {}, server, small=True)

    def _add(
        self,
        service: str,
        handlers: dict[str, Handler],
        methods: dict[str, Method],
        server: AcceptsHandlers,
        *,
        small: bool = False,
    ) -> None:
        async def reject(name: str, error: ElsError, context: Context) -> NoReturn:
            if name not in methods:
                methods[name] = self._method(service, name, handlers[name])
            await self._fail(error, self._begin(methods[name], None, context))

        bounded = {
            name: small_messages(handler, self._receiver) if small else handler
            for name, handler in handlers.items()
        }
        server.add_generic_rpc_handlers((self._access.protected(service, bounded, reject),))

    @property
    def in_flight(self) -> int:
        """Number of calls whose response has not been sent."""
        return self._in_flight

    async def idle(self, timeout_s: float) -> bool:
        """Wait at most ``timeout_s`` until no call is in flight; return whether that is so."""
        if self._in_flight:
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), timeout_s)
        return not self._in_flight

    def _method(self, service: str, name: str, handler: Handler) -> Method:
        request = handler.request_deserializer.__self__.DESCRIPTOR
        fields = (field for field in _MODEL_FIELDS if field in request.fields_by_name)
        kind = _KINDS[handler.request_streaming, handler.response_streaming]
        return self._metrics.method(kind, service, name, next(fields, ""))

    def _wrap(self, method: Method, handler: Handler) -> Handler:
        deserializer = handler.request_deserializer
        parse = parser(deserializer, method, self._limits, self._is_model)
        decompress = Decompressor(self._receiver.memory, deserializer, self._limits)
        serialize = serializer(handler.response_serializer)
        if handler.request_streaming:
            call = self._bidi_stream(method, handler.stream_stream, parse, decompress)
        elif handler.response_streaming:
            call = self._server_stream(method, handler.unary_stream, parse, decompress)
        else:
            # Registered as a stream of requests, so that gRPC leaves reading to the handler.
            return grpc.stream_unary_rpc_method_handler(
                self._unary(method, handler.unary_unary, parse, decompress), None, serialize
            )
        return grpc.stream_stream_rpc_method_handler(call, None, serialize)

    def _unary(self, method: Method, handler: Any, parse: Parse, decompress: Decompressor) -> Any:
        receiver, reject = self._receiver, self._rejection(method)
        memory, draining = receiver.memory, self.draining.is_set

        async def call(_: object, context: Context) -> Any:
            # ``Receiver.read``, inlined to save a frame of every call.
            receiver.begin(context, token_name(), reject)
            size = 0
            try:
                data = await context.read()
                if data is grpc.aio.EOF:
                    data = None
                else:
                    size = len(data)
            except ElsError as error:
                await _rejected(error, context, reject)
            finally:
                receiver.end(context, size)
            # gRPC would keep the response to a disconnected client in memory.
            task = check_cancelled()
            if size and is_large_gzip(data):
                data = await _decompressed(decompress, data, context, reject)
                size = 0 if isinstance(data, Malformed) else len(data)
            request = parse(data)
            del data
            record = self._begin(method, request, context, task)
            holding: Holding | None = None
            try:
                if size > LARGE_BYTES:
                    holding = memory.reserve(caller_of(context), size)
                if draining() or type(request) is Malformed:
                    self._check(request)
                response = await handler(request, context)
                if holding is None and (size := response_bytes(response)) > LARGE_BYTES:
                    holding = memory.reserve(caller_of(context), size)
            except BaseException as error:
                del request  # gRPC keeps this frame until the next garbage collection
                if holding is not None:
                    memory.budget.release(holding)
                await self._fail(error, record)
            if holding is not None:
                memory.release_when_sent(holding, task, context.peer())
            self._end("OK", record)
            return response

        return call

    def _server_stream(
        self, method: Method, handler: Any, parse: Parse, decompress: Decompressor
    ) -> Any:
        """Return the handler of a method with one request and a stream of responses."""
        receiver, reject = self._receiver, self._rejection(method)

        async def call(_: object, context: Context) -> None:
            try:
                received = await receiver.read(context, token_name(), reject, receiver.receive_s)
            except ElsError as error:
                await _rejected(error, context, reject)
            data: bytes | Malformed | None = received
            if received is not None and is_large_gzip(received):
                data = await _decompressed(decompress, received, context, reject)
            request = parse(data)
            del received, data
            record = self._begin(method, request, context)
            try:
                self._check(request)
                await write_all(handler(request, context), method, context)
            except BaseException as error:
                del request
                await self._fail(error, record)
            self._end("OK", record)

        return call

    def _bidi_stream(
        self, method: Method, handler: Any, parse: Parse, decompress: Decompressor
    ) -> Any:
        """Return the handler of a method with streams of requests and responses."""

        async def call(_: object, context: Context) -> None:
            record = self._begin(method, None, context)

            async def reject(_: Context, error: ElsError) -> None:
                await self._fail(error, record)

            requests = RequestStream(
                self._receiver, context, token_name(), reject, parse, decompress
            )
            try:
                self._check(None)
                await write_all(handler(requests, context), method, context)
            except grpc.aio.AbortError:
                raise  # rejected while it awaited a message
            except BaseException as error:
                await self._fail(error, record)
            finally:
                requests.close()
            self._end("OK", record)

        return call

    def _rejection(self, method: Method) -> Reject:
        """Return a function that ends a call whose message has not been read."""

        async def reject(context: Context, error: ElsError) -> None:
            await self._fail(error, self._begin(method, None, context))

        return reject

    def _begin(
        self,
        method: Method,
        request: Any,
        context: Context,
        task: asyncio.Task[Any] | None = None,
    ) -> CallRecord:
        """Count the call, and return its record; begins its span if it is traced."""
        self._in_flight += 1
        # At the end of the task, when the response has been sent, not of the handler. Callbacks of
        # the context also run then, but create a reference cycle of call and context.
        task = task or asyncio.current_task()
        assert task is not None
        task.add_done_callback(self._done, context=_NO_VARIABLES)
        method.started += 1
        call = CallRecord(method, request, context)
        if self._tracing is not None:
            span = self._tracing.begin(method.path, context.invocation_metadata() or ())
            if span is not None:
                call.trace, call.trace_id = span, self._tracing.trace_id(span)
        # Each call runs in a task, and therefore in a context, of its own.
        CALL.set(call)
        return call

    def _check(self, request: Any) -> None:
        if self.draining.is_set():
            raise UnavailableError("the server is draining; send the request to another replica")
        check_message(request)

    def _end(
        self, code: str, call: CallRecord, reason: str = "", cause: BaseException | None = None
    ) -> None:
        """Count and log the call, and end its span."""
        seconds = time.monotonic() - call.since
        name = getattr(call.request, call.method.model_field, "")
        # gRPC's objects may keep the record until the next garbage collection.
        call.request = None
        model = name if self._is_model(name) else ""
        call.method.end(model, code, seconds, call.trace_id)
        if self._tracing is not None and call.trace is not None:
            self._tracing.end(call.trace, code, model)
        level = _LEVELS.get(code, logging.INFO)
        if _log.isEnabledFor(level):
            fields = {
                "method": call.method.name,
                "model": model,
                "code": code,
                "seconds": round(seconds, 6),
                "peer": call.context.peer(),
                "caller": caller_of(call.context),
                "reason": reason,
            }
            _log.log(level, "call", extra=fields, exc_info=cause)

    async def _fail(self, error: BaseException, call: CallRecord) -> NoReturn:
        """Count and log the call, and end it with the status of an exception."""
        if isinstance(error, asyncio.CancelledError):
            self._end("DEADLINE_EXCEEDED" if call.is_late() else "CANCELLED", call)
            try:
                raise error
            finally:
                del error  # its traceback references this frame
        if not isinstance(error, Exception):
            raise error
        # gRPC's own contexts have no such attribute.
        options = getattr(call.context, "deadline_options", DEADLINE_OPTIONS)
        status = status_of(error, options)
        code = code_pb2.Code.Name(status.code)
        self._end(code, call, status.message, None if isinstance(error, ElsError) else error)
        drop_tracebacks(error)
        await call.context.abort(
            grpc.StatusCode[code],
            status.message,
            (("grpc-status-details-bin", status.SerializeToString()),),
        )
        raise AssertionError("abort always raises")


async def _decompressed(
    decompress: Decompressor, data: bytes, context: Context, reject: Reject
) -> bytes | Malformed:
    try:
        return await decompress(caller_of(context), data)
    except ElsError as error:
        await _rejected(error, context, reject)


async def _rejected(error: ElsError, context: Context, reject: Reject) -> NoReturn:
    """End a call whose message cannot be read: of HTTP, or one that is decompressed."""
    await reject(context, error)
    raise AssertionError("abort always raises")
