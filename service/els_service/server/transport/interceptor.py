"""Interceptor of calls: parses, counts, logs and traces them, and maps errors to statuses.

A status carries ``google.rpc.BadRequest`` details where a field is to blame. An exception that is
no ``ElsError`` becomes INTERNAL with a neutral text; the log has its cause.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import grpc
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2

from els_service.config import Limits
from els_service.engine.budget import Holding
from els_service.engine.request_context import timed_out
from els_service.errors import (
    ElsError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
    fit_for_headers,
)
from els_service.logs import CALL
from els_service.server.requests.message_structure import (
    SMALL_BYTES,
    MessageStructureError,
    check_structure,
    inflated,
    is_gzip,
    is_large_gzip,
)
from els_service.server.telemetry.metrics import Method, Metrics
from els_service.server.transport.caller import caller_of, token_name
from els_service.server.transport.deadlines import unrounded_s
from els_service.server.transport.grpc_workarounds import check_cancelled
from els_service.server.transport.receiving import LARGE_BYTES, Messages, Receiver, Reject

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from els_service.server.telemetry.tracing import Tracing

_log = logging.getLogger(__name__)

_LEVELS = {"OK": logging.DEBUG, "INTERNAL": logging.ERROR}
_MODEL_FIELDS = ("model", "model_name", "name")
"""Where requests name their model."""
_KINDS = {
    (False, False): "unary",
    (True, False): "client_stream",
    (False, True): "server_stream",
    (True, True): "bidi_stream",
}
"""(requests, answers) are streams → ``grpc_type``."""
SMALL_MESSAGE_BYTES = 4096
"""Of a message to health, reflection or channelz."""
SMALL_MESSAGE_S = 2.0
"""How long such a message may take to arrive."""
UNREADABLE = "?"
"""First field of a message that stands for one that is too large, or none of its type."""
_NO_VARIABLES = contextvars.Context()
"""Saves a copy of the current context at every call."""
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")

Handler = Any
"""A ``grpc.RpcMethodHandler``; its stubs cannot say of which request."""
Answer = Any
"""A message of the method, or its bytes; the generated bases know only of messages."""
Parse = Callable[[bytes | None], Any]
"""Returns the request that a message is, or ``_Malformed``; None stands for no message."""
Context = Any
"""A ``grpc.aio.ServicerContext``; the generated bases ask for a type that is the sync one too."""


@dataclass(frozen=True)
class _Malformed:
    """Stands for a request whose bytes are no message."""

    reason: str


class CallRecord:
    """One call under way."""

    __slots__ = ("_fields", "context", "method", "request", "since", "trace", "trace_id")

    def __init__(self, method: Method, request: Any, context: Context) -> None:
        self.method, self.request, self.context = method, request, context
        self.trace: Span | None = None
        self.trace_id: str | None = None
        self.since = time.monotonic()
        self._fields: dict[str, str] | None = None

    def log_fields(self) -> dict[str, str]:
        """Return the ids that every record of the call carries; made only if there is one."""
        if self._fields is None:
            self._fields = _ids(self.context, self.trace_id)
        return self._fields


class Access(Protocol):
    """Check of who may call which method."""

    def guarded(
        self,
        service: str,
        handlers: Mapping[str, Handler],
        refuse: Callable[[str, ElsError, Any], Awaitable[NoReturn]],
    ) -> grpc.GenericRpcHandler:
        """Return a service's handlers, by method, for callers who may call them."""


class _Collector:
    """Takes the handlers that generated code would give to a server."""

    def __init__(self) -> None:
        self.handlers: dict[str, dict[str, Handler]] = {}

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Handler]) -> None:
        self.handlers[service] = handlers

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Leave them: they are the same ones."""


class CallInterceptor:
    """The calls under way; wraps the handlers of a service once, when it is registered.

    A ``grpc.aio.ServerInterceptor`` could do the same, at a tenth more for every call.
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

        # Made once, not at every call.
        self._done = done
        self._idle = asyncio.Event()
        self.draining = asyncio.Event()
        """Set when new calls are refused as UNAVAILABLE, and streams should end."""

    def register(
        self, add_to_server: Callable[[Any, Any], None], servicer: object, server: grpc.aio.Server
    ) -> None:
        """Add a servicer to a server, by the function that was generated for it.

        A servicer may answer with the bytes of a message.
        """
        collector = _Collector()
        add_to_server(servicer, collector)
        for service, handlers in collector.handlers.items():
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
        """Add a servicer whose calls are checked for access; only refused ones are counted."""
        collector = _Collector()
        add_to_server(servicer, collector)
        for service, handlers in collector.handlers.items():
            self._add(service, handlers, {}, server, small=True)

    def _add(
        self,
        service: str,
        handlers: dict[str, Handler],
        methods: dict[str, Method],
        server: grpc.aio.Server,
        *,
        small: bool = False,
    ) -> None:
        async def refuse(name: str, error: ElsError, context: Context) -> NoReturn:
            if name not in methods:
                methods[name] = self._method(service, name, handlers[name])
            await self._fail(error, self._begin(methods[name], None, context))

        taken = {
            name: small_messages(handler, self._receiver) if small else handler
            for name, handler in handlers.items()
        }
        server.add_generic_rpc_handlers((self._access.guarded(service, taken, refuse),))

    @property
    def in_flight(self) -> int:
        """Calls whose answers have not left."""
        return self._in_flight

    async def idle(self, timeout_s: float) -> bool:
        """Wait until the last answer has left, ``timeout_s`` at most; return whether it has."""
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
        parse = _tolerant(handler.request_deserializer, method, self._limits)
        serializer = _lenient(handler.response_serializer)
        if handler.request_streaming:
            call = self._streaming(method, handler.stream_stream, parse)
        elif handler.response_streaming:
            call = self._answering(method, handler.unary_stream, parse)
        else:
            # To gRPC it takes a stream of requests, so that reading the one is ours.
            return grpc.stream_unary_rpc_method_handler(
                self._unary(method, handler.unary_unary, parse), None, serializer
            )
        return grpc.stream_stream_rpc_method_handler(call, None, serializer)

    def _unary(self, method: Method, behaviour: Any, parse: Parse) -> Any:
        receiver, reject = self._receiver, self._rejecting(method)
        draining = self.draining.is_set

        async def call(_: object, context: Context) -> Any:
            # As ``Receiver.read``, without its frame: every small call comes by.
            receiver.begin(context, token_name(), reject)
            size = 0
            try:
                data = await context.read()
                if data is grpc.aio.EOF:
                    data = None
                else:
                    size = len(data)
            finally:
                receiver.end(context, size)
            # An answer to a caller who is gone would stay in gRPC's memory.
            task = check_cancelled()
            if size and is_large_gzip(data):
                data = await self._decompressed(data, context, reject)
                size = len(data)
            request = parse(data)
            del data
            under_way = self._begin(method, request, context, task)
            holding: Holding | None = None
            try:
                if size > LARGE_BYTES:
                    holding = receiver.hold(caller_of(context), size)
                if draining() or type(request) is _Malformed:
                    self._admit(request)
                answer = await behaviour(request, context)
                if holding is None and (size := _size(answer)) > LARGE_BYTES:
                    holding = receiver.hold(caller_of(context), size)
            except BaseException as error:
                del request  # grpc keeps this frame until garbage is collected
                if holding is not None:
                    receiver.budget.release(holding)
                await self._fail(error, under_way)
            if holding is not None:
                receiver.hold_until_sent(holding, task, context.peer())
            self._end("OK", under_way)
            return answer

        return call

    def _answering(self, method: Method, behaviour: Any, parse: Parse) -> Any:
        """Return the handler of a method that answers one message with a stream."""
        receiver, reject = self._receiver, self._rejecting(method)

        async def call(_: object, context: Context) -> None:
            data = await receiver.read(context, token_name(), reject, receiver.receive_s)
            if data is not None and is_large_gzip(data):
                data = await self._decompressed(data, context, reject)
            request = parse(data)
            del data
            under_way = self._begin(method, request, context)
            try:
                self._admit(request)
                await _write_all(behaviour(request, context), method, context)
            except BaseException as error:
                del request
                await self._fail(error, under_way)
            self._end("OK", under_way)

        return call

    def _streaming(self, method: Method, behaviour: Any, parse: Parse) -> Any:
        async def call(_: object, context: Context) -> None:
            under_way = self._begin(method, None, context)

            async def reject(_: Context, error: ElsError) -> None:
                await self._fail(error, under_way)

            size = self._limits.max_message_bytes
            requests = Messages(self._receiver, context, token_name(), reject, parse, size)
            try:
                self._admit(None)
                await _write_all(behaviour(requests, context), method, context)
            except grpc.aio.AbortError:
                raise  # it was rejected while it waited for a message
            except BaseException as error:
                await self._fail(error, under_way)
            finally:
                requests.close()
            self._end("OK", under_way)

        return call

    async def _decompressed(self, data: bytes, context: Context, reject: Reject) -> bytes:
        try:
            caller, size = caller_of(context), self._limits.max_message_bytes
            return await self._receiver.decompressed(caller, data, size)
        except ElsError as error:
            await reject(context, error)
            raise AssertionError("abort always raises") from error

    def _rejecting(self, method: Method) -> Reject:
        """Return what ends a call whose message is not there yet."""

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
        self._in_flight += 1
        # Not when the handler ends: its answer may have a long way to go yet. The context's own
        # callbacks end with the task, too, but tie call and context together until garbage is
        # collected.
        task = task or asyncio.current_task()
        assert task is not None
        task.add_done_callback(self._done, context=_NO_VARIABLES)
        method.started += 1
        call = CallRecord(method, request, context)
        if self._tracing is not None:
            span = self._tracing.begin(method.path, context.invocation_metadata() or ())
            if span is not None:
                call.trace, call.trace_id = span, self._tracing.trace_id(span)
        # Every call has a task of its own, and with it a context.
        CALL.set(call)
        return call

    def _admit(self, request: Any) -> None:
        if self.draining.is_set():
            raise UnavailableError("the server is draining; ask another")
        check_message(request)

    def _end(
        self, code: str, call: CallRecord, reason: str = "", cause: BaseException | None = None
    ) -> None:
        """Count and log the call, and end its span."""
        seconds = time.monotonic() - call.since
        name = getattr(call.request, call.method.model_field, "")
        # The record may stay, with gRPC's own objects, until garbage is collected.
        call.request = None
        # Any other name would let callers make as many label values as they please.
        model = name if self._is_model(name) else ""
        call.method.end(model, code, seconds, call.trace_id)
        if self._tracing is not None and call.trace is not None:
            self._tracing.end(call.trace, code, model)
        level = _LEVELS.get(code, logging.INFO)
        if _log.isEnabledFor(level):
            record = {
                "method": call.method.name,
                "model": model,
                "code": code,
                "seconds": round(seconds, 6),
                "peer": call.context.peer(),
                "caller": caller_of(call.context),
                "reason": reason,
            }
            _log.log(level, "call", extra=record, exc_info=cause)

    async def _fail(self, error: BaseException, call: CallRecord) -> NoReturn:
        """Count, log, and end the call with the error's status."""
        if isinstance(error, asyncio.CancelledError):
            self._end("DEADLINE_EXCEEDED" if _is_late(call) else "CANCELLED", call)
            try:
                raise error
            finally:
                del error  # it knows this frame
        if not isinstance(error, Exception):
            raise error
        status = status_of(error)
        code = code_pb2.Code.Name(status.code)
        self._end(code, call, status.message, None if isinstance(error, ElsError) else error)
        _forget_frames(error)
        await call.context.abort(
            grpc.StatusCode[code],
            status.message,
            (("grpc-status-details-bin", status.SerializeToString()),),
        )
        raise AssertionError("abort always raises")


def _forget_frames(error: BaseException | None) -> None:
    """Drop the tracebacks of an error and of those that it was raised from or during.

    Their frames know the request, and the error: all would stay until garbage is collected.
    """
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            one.__traceback__ = None
            waiting += (one.__cause__, one.__context__)


async def _write_all(answers: Any, method: Method, context: Context) -> None:
    # Writes by itself: grpc leaves a generator whose caller is gone to the collector, by when the
    # call is freed and asking its context for the peer ends the process.
    async with contextlib.aclosing(answers):
        async for answer in answers:
            await _write(context, answer)
            method.sent += 1


def _size(answer: Answer) -> int:
    """Return the bytes of an answer."""
    size: int = len(answer) if type(answer) is bytes else answer.ByteSize()
    return size


async def _write(context: Context, answer: Any) -> None:
    try:
        await context.write(answer)
    except grpc.aio.AbortError:
        raise  # its call was rejected meanwhile
    except grpc.aio.BaseError as error:
        raise asyncio.CancelledError("the caller is gone") from error
    check_cancelled()


def current_trace() -> object | None:
    """Return what the current call's part of a trace hangs on; None where it is not traced."""
    call = CALL.get()
    return None if call is None else call.trace


def check_message(request: object) -> None:
    """Raise InvalidArgumentError if the bytes of a request were no message."""
    if isinstance(request, _Malformed):
        raise InvalidArgumentError("request", "a message of this method", request.reason)


def status_of(error: Exception) -> status_pb2.Status:
    """Return what a caller is told of an error: neutral words unless it is one of ours."""
    if not isinstance(error, ElsError):
        text = "internal error; the server's log has the cause"
        return status_pb2.Status(code=code_pb2.INTERNAL, message=text)
    status = status_pb2.Status(
        code=code_pb2.Code.Value(error.code), message=fit_for_headers(str(error))
    )
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
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(round(error.retry_after_s * 1e9))
        status.details.add().Pack(retry)
    return status


def _is_late(call: CallRecord) -> bool:
    """Return whether a cancelled call's deadline has passed: its caller's may, a little before."""
    left = call.context.time_remaining()
    if left is None:
        return False
    waited = time.monotonic() - call.since
    return timed_out(unrounded_s(left + waited) - waited)


def _ids(context: Context, trace_id: str | None) -> dict[str, str]:
    """Return the caller's ``x-request-id`` or a new one, and the trace's id where there is one."""
    metadata = dict(context.invocation_metadata() or ())
    ids = {"request_id": metadata.get("x-request-id", "")[:128] or uuid.uuid4().hex}
    if caller := _TRACEPARENT.match(metadata.get("traceparent", "")):
        ids["trace_id"] = caller[1]
    elif trace_id is not None:
        ids["trace_id"] = trace_id
    return ids


def _tolerant(deserializer: Any, method: Method, limits: Limits) -> Any:
    """Return a deserializer that answers garbage with ``_Malformed``: grpc would say INTERNAL.

    gRPC would decompress without a bound, and the parser makes much of little: both are bounded
    before they begin.
    """
    descriptor = deserializer.__self__.DESCRIPTOR

    def parse(data: bytes | None) -> Any:
        if data is None:
            return _Malformed("none")
        method.received += 1
        try:
            if len(data) > SMALL_BYTES or is_gzip(data):
                data = inflated(data, limits.max_message_bytes)
                check_structure(data, descriptor, limits.max_images)
            return deserializer(data)
        except (DecodeError, MessageStructureError) as error:
            return _Malformed(str(error) or "truncated or garbage bytes")

    return parse


class SmallMessages:
    """Server as generated code sees it, whose handlers take small messages only.

    For health and reflection, which need no token and no large message.

    Args:
        server: to which the handlers are added.
        receiver: reads their messages.
    """

    def __init__(self, server: grpc.aio.Server, receiver: Receiver) -> None:
        self._server, self._receiver = server, receiver

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Handler]) -> None:
        """Add a service's handlers."""
        small = {
            name: small_messages(handler, self._receiver) for name, handler in handlers.items()
        }
        generic = grpc.method_handlers_generic_handler(service, small)
        self._server.add_generic_rpc_handlers((generic,))
        # Calls of registered methods wait apart: a flood of them turns no other call away.
        self._server.add_registered_method_handlers(service, small)

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Leave them: they are the same ones."""


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
            # Names nothing that is there, and is answered so.
            return deserializer(b"\x0a\x01" + UNREADABLE.encode())

    async def one(context: Context) -> Any:
        return parse(await receiver.read(context, token_name(), _abort, SMALL_MESSAGE_S))

    if handler.request_streaming:

        async def talk(_: object, context: Context) -> None:
            limit = SMALL_MESSAGE_BYTES, receiver.receive_s
            requests = Messages(receiver, context, token_name(), _abort, parse, *limit)
            try:
                async with contextlib.aclosing(handler.stream_stream(requests, context)) as answers:
                    async for answer in answers:
                        await _write(context, answer)
            finally:
                requests.close()

        return grpc.stream_stream_rpc_method_handler(talk, None, handler.response_serializer)
    if handler.response_streaming:

        async def watch(_: object, context: Context) -> None:
            await handler.unary_stream(await one(context), context)

        return grpc.stream_stream_rpc_method_handler(watch, None, handler.response_serializer)

    async def ask(_: object, context: Context) -> Any:
        return await handler.unary_unary(await one(context), context)

    return grpc.stream_unary_rpc_method_handler(ask, None, handler.response_serializer)


async def _abort(context: Context, error: ElsError) -> None:
    await context.abort(grpc.StatusCode[error.code], str(error))


def _lenient(serializer: Any) -> Any:
    """Return a serializer that takes bytes as they are."""

    def write(answer: Any) -> bytes:
        data: bytes = answer if type(answer) is bytes else serializer(answer)
        return data

    return write
